"""POST /v1/completions: text from prompts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from server.api.generation import (
    Deltas,
    UsageCounter,
    collect,
    completion_logprobs,
    generate,
)
from server.api.responses import Completion, CompletionChoice
from server.api.schemas import CompletionRequest
from server.api.state import metrics_of, runtime_of
from server.api.streaming import DONE, EventStream, event, unless_gone
from server.errors import ContextTooLong
from server.tokenization import Tokenizer

router = APIRouter()


@router.post("/v1/completions", response_model=Completion)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    runtime = runtime_of(request)
    tokenizer = runtime.tokenizer
    params = body.sampling(tokenizer.vocab_size)
    async with AsyncExitStack() as stack:
        lease = stack.enter_context(runtime.adapters.lease(body.model, body.mixture()))
        prompts = [
            await run_in_threadpool(tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        deltas = await stack.enter_async_context(
            aclosing(generate(runtime, prompts, params, lease, body.n, metrics_of(request)))
        )
        usage = UsageCounter(sum(map(len, prompts)), body.n)
        writer = _Writer(tokenizer, lease.label, with_logprobs=params.logprobs is not None)
        try:
            if body.stream:
                events = writer.events(deltas, usage, body.include_usage)
                first = await unless_gone(request.receive, anext(events))
                return EventStream(first, events, stack.pop_all())
            num_choices = len(prompts) * body.n
            whole = writer.whole(deltas, num_choices, usage)
            return JSONResponse(await unless_gone(request.receive, whole))
        except ContextTooLong as exc:
            exc.param = "prompt"
            raise


class _Writer:
    """Puts one request's choices into OpenAI's words."""

    def __init__(self, tokenizer: Tokenizer, label: str, *, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": label,
        }

    async def whole(self, deltas: Deltas, num_choices: int, usage: UsageCounter) -> dict[str, Any]:
        choices = [
            CompletionChoice(
                index=choice.index,
                text=choice.text,
                logprobs=completion_logprobs(self._tokenizer, choice.tokens)
                if self._with_logprobs
                else None,
                finish_reason=choice.finish_reason,
            )
            for choice in await collect(deltas, num_choices, usage)
        ]
        return Completion(**self._head, choices=choices, usage=usage.usage()).model_dump()

    async def events(
        self, deltas: Deltas, usage: UsageCounter, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        no_usage = {"usage": None} if include_usage else {}
        offsets: dict[int, int] = {}
        async for delta in deltas:
            usage.add(delta)
            logprobs = None
            if self._with_logprobs and delta.tokens:
                offset = offsets.get(delta.index, 0)
                logprobs = completion_logprobs(self._tokenizer, delta.tokens, offset)
                offsets[delta.index] = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
            if not (delta.text or logprobs or delta.finish_reason):
                continue  # a token that gave no text yet
            choice = CompletionChoice(
                index=delta.index,
                text=delta.text,
                logprobs=logprobs,
                finish_reason=delta.finish_reason,
            )
            yield self._event(choices=[choice], **no_usage)
        if include_usage:
            yield self._event(choices=[], usage=usage.usage())
        yield DONE

    def _event(self, **fields: Any) -> str:
        return event(Completion(**self._head, **fields).model_dump_json(exclude_unset=True))
