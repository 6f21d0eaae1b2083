"""POST /v1/completions: text from prompts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from server.api.generation import (
    Choice,
    Deltas,
    UsageCounter,
    best_choices,
    collect,
    completion_logprobs,
    generate,
)
from server.api.responses import Completion, CompletionChoice
from server.api.schemas import CompletionRequest
from server.api.state import metrics_of, runtime_of
from server.api.streaming import DONE, EventStream, event, unless_gone
from server.engine.sequence import SampledToken
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
        constraint = body.constraint()
        if constraint is not None:
            params = replace(params, grammar=await runtime.grammars.compile(constraint))
        n = body.num_candidates
        deltas = await stack.enter_async_context(
            aclosing(generate(runtime, prompts, params, lease, n, metrics_of(request)))
        )
        usage = UsageCounter(sum(map(len, prompts)), n)
        writer = _Writer(
            tokenizer,
            lease.label,
            with_logprobs=body.logprobs is not None,
            echoed=[_Echo(tokenizer, *both) for both in zip(body.prompt, prompts, strict=True)]
            if body.echo
            else None,
        )
        try:
            if body.stream:
                events = writer.events(deltas, usage, body.include_usage, n)
                first = await unless_gone(request.receive, anext(events))
                return EventStream(first, events, stack.pop_all())
            choices = collect(deltas, len(prompts) * n, usage)
            whole = writer.whole(choices, usage, n, body.n)
            return JSONResponse(await unless_gone(request.receive, whole))
        except ContextTooLong as exc:
            exc.param = "prompt"
            raise


class _Echo:
    """One prompt, as it is given back."""

    def __init__(self, tokenizer: Tokenizer, prompt: str | list[int], token_ids: list[int]) -> None:
        self.first = SampledToken(token_ids[0])
        self.text = prompt if isinstance(prompt, str) else tokenizer.text(token_ids)


class _Writer:
    """Puts one request's choices into OpenAI's words.

    Args:
        echoed: the prompts, where they are to be given back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        label: str,
        *,
        with_logprobs: bool,
        echoed: Sequence[_Echo] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._echoed = echoed
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": label,
        }

    async def whole(
        self,
        collecting: Coroutine[Any, Any, list[Choice]],
        usage: UsageCounter,
        candidates: int,
        n: int,
    ) -> dict[str, Any]:
        """The answer: of each prompt's `candidates` choices the best `n`."""
        choices = await collecting
        if candidates > n:
            choices = best_choices(choices, candidates, n)
        written = []
        for choice in choices:
            echo = self._echoed[choice.index // n] if self._echoed else None
            tokens = [echo.first, *choice.prompt, *choice.tokens] if echo else choice.tokens
            written.append(
                CompletionChoice(
                    index=choice.index,
                    text=echo.text + choice.text if echo else choice.text,
                    logprobs=completion_logprobs(self._tokenizer, tokens)
                    if self._with_logprobs
                    else None,
                    finish_reason=choice.finish_reason,
                )
            )
        return Completion(**self._head, choices=written, usage=usage.usage()).model_dump()

    async def events(
        self, deltas: Deltas, usage: UsageCounter, include_usage: bool, n: int
    ) -> AsyncGenerator[str, None]:
        no_usage = {"usage": None} if include_usage else {}
        offsets: dict[int, int] = {}
        async for delta in deltas:
            usage.add(delta)
            text, tokens = delta.text, delta.tokens
            if self._echoed and delta.index not in offsets:
                echo = self._echoed[delta.index // n]
                text, tokens = echo.text + text, [echo.first, *delta.prompt, *tokens]
            offset = offsets.setdefault(delta.index, 0)
            logprobs = None
            if self._with_logprobs and tokens:
                logprobs = completion_logprobs(self._tokenizer, tokens, offset)
                offsets[delta.index] = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
            if not (text or logprobs or delta.finish_reason):
                continue  # a token that gave no text yet
            choice = CompletionChoice(
                index=delta.index,
                text=text,
                logprobs=logprobs,
                finish_reason=delta.finish_reason,
            )
            yield self._event(choices=[choice], **no_usage)
        if include_usage:
            yield self._event(choices=[], usage=usage.usage())
        yield DONE

    def _event(self, **fields: Any) -> str:
        return event(Completion(**self._head, **fields).model_dump_json(exclude_unset=True))
