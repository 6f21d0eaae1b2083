"""POST /v1/chat/completions: the assistant's next turn in a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from server.api.generation import (
    Deltas,
    UsageCounter,
    chat_logprobs,
    collect,
    generate,
)
from server.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
)
from server.api.schemas import ChatCompletionRequest
from server.api.state import metrics_of, runtime_of
from server.api.streaming import DONE, EventStream, event, unless_gone
from server.engine.sequence import SampledToken
from server.tokenization import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    runtime = runtime_of(request)
    tokenizer = runtime.tokenizer
    async with AsyncExitStack() as stack:
        lease = stack.enter_context(runtime.adapters.lease(body.model, body.mixture()))
        runtime.check_generates(lease)
        messages = [message.to_template() for message in body.messages]
        prompt = await run_in_threadpool(tokenizer.chat, messages)
        room = runtime.max_model_len - lease.num_virtual_tokens - len(prompt)
        params = body.sampling(room, tokenizer.vocab_size)
        deltas = await stack.enter_async_context(
            aclosing(generate(runtime, [prompt], params, lease, body.n, metrics_of(request)))
        )
        usage = UsageCounter(len(prompt), body.n)
        writer = _Writer(tokenizer, lease.label, with_logprobs=params.logprobs is not None)
        if body.stream:
            events = writer.events(deltas, usage, body.include_usage)
            first = await unless_gone(request.receive, anext(events))
            return EventStream(first, events, stack.pop_all())
        whole = writer.whole(deltas, body.n, usage)
        return JSONResponse(await unless_gone(request.receive, whole))


class _Writer:
    """Puts one request's choices into OpenAI's words."""

    def __init__(self, tokenizer: Tokenizer, label: str, *, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": label,
        }

    async def whole(self, deltas: Deltas, num_choices: int, usage: UsageCounter) -> dict[str, Any]:
        choices = [
            ChatChoice(
                index=choice.index,
                message=ChatMessage(role="assistant", content=choice.text, refusal=None),
                logprobs=self._logprobs(choice.tokens),
                finish_reason=choice.finish_reason,
            )
            for choice in await collect(deltas, num_choices, usage)
        ]
        return ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=usage.usage()
        ).model_dump()

    async def events(
        self, deltas: Deltas, usage: UsageCounter, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        no_usage = {"usage": None} if include_usage else {}

        def chunk(
            index: int,
            delta: ChatDelta,
            logprobs: ChatLogprobs | None = None,
            reason: FinishReason | None = None,
        ) -> str:
            choice = ChatChunkChoice(
                index=index, delta=delta, logprobs=logprobs, finish_reason=reason
            )
            return self._event(choices=[choice], **no_usage)

        begun: set[int] = set()
        async for item in deltas:
            usage.add(item)
            if item.index not in begun:
                begun.add(item.index)
                yield chunk(item.index, ChatDelta(role="assistant", content=""))
            logprobs = self._logprobs(item.tokens) if item.tokens else None
            if item.text or logprobs:
                yield chunk(item.index, ChatDelta(content=item.text), logprobs)
            if item.finish_reason:
                yield chunk(item.index, ChatDelta(), None, item.finish_reason)
        if include_usage:
            yield self._event(choices=[], usage=usage.usage())
        yield DONE

    def _logprobs(self, tokens: Sequence[SampledToken]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, tokens) if self._with_logprobs else None

    def _event(self, **fields: Any) -> str:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", **fields)
        return event(chunk.model_dump_json(exclude_unset=True))
