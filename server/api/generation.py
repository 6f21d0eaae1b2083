"""Generation as both APIs need it: several prompts at once, usage, log probabilities, metrics.

Choice j of prompt i has the index i·n + j. Knows nothing of events or of response bodies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from server.api.access import current_record
from server.api.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    FinishReason,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from server.engine.sequence import SampledToken, SamplingParams
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.adapters.manager import Lease
    from server.runtime import ChoiceDelta, Runtime
    from server.tokenization import Tokenizer

Deltas = AsyncGenerator["ChoiceDelta", None]


async def generate(
    runtime: Runtime,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    lease: Lease,
    n: int,
    metrics: Metrics,
) -> Deltas:
    """Deltas of all choices of all prompts, as they come. Closing it early aborts them all.

    Raises, before the first item:
        QueueFull: see `Runtime.check_queue`.
        BadRequest, ContextTooLong, Unavailable: see `Runtime.generate`.
    """
    runtime.check_queue()
    arrived = time.perf_counter()
    last: dict[int, float] = {}
    num_prompt, num_generated = sum(map(len, prompts)), 0
    generated = metrics.begun(lease.names, num_prompt)
    record = current_record()
    record.adapter, record.num_prompt_tokens = ",".join(lease.names) or None, num_prompt
    each = [
        _shifted(runtime.generate(prompt, params, lease, n=n), i * n)
        for i, prompt in enumerate(prompts)
    ]
    try:
        async with aclosing(each[0] if len(each) == 1 else _merged(each)) as deltas:
            async for delta in deltas:
                if delta.tokens:
                    now = time.perf_counter()
                    num_generated += len(delta.tokens)
                    generated(len(delta.tokens))
                    if delta.index in last:
                        metrics.next_token((now - last[delta.index]) / len(delta.tokens))
                    else:
                        metrics.first_token(now - arrived)
                    last[delta.index] = now
                yield delta
    finally:
        record.num_output_tokens = num_generated


async def _shifted(deltas: Deltas, offset: int) -> Deltas:
    async with aclosing(deltas):
        async for delta in deltas:
            yield replace(delta, index=delta.index + offset) if offset else delta


async def _merged(sources: Sequence[Deltas]) -> Deltas:
    """All sources at once; the first failure ends the others."""
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()

    async def pump(source: Deltas) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as exc:
            queue.put_nowait(exc)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        num_left = len(tasks)
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task cancelled before its first step never got to close its source.
        for source in sources:
            await source.aclose()


class UsageCounter:
    """Adds up what a request used. A prompt counts once, however many choices it has."""

    def __init__(self, num_prompt_tokens: int, n: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._n = n
        self._num_completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, delta: ChoiceDelta) -> None:
        self._num_completion_tokens += len(delta.tokens)
        self._cached.setdefault(delta.index // self._n, delta.num_cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )


@dataclass
class Choice:
    """One finished choice."""

    index: int
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    prompt: Sequence[SampledToken] = ()
    finish_reason: FinishReason | None = None


async def collect(deltas: Deltas, num_choices: int, usage: UsageCounter) -> list[Choice]:
    """Wait for the end of every choice."""
    choices = [Choice(index) for index in range(num_choices)]
    async for delta in deltas:
        usage.add(delta)
        choice = choices[delta.index]
        choice.text += delta.text
        choice.tokens += delta.tokens
        choice.prompt = choice.prompt or delta.prompt
        choice.finish_reason = delta.finish_reason or choice.finish_reason
    return choices


def best_choices(choices: Sequence[Choice], num_candidates: int, n: int) -> list[Choice]:
    """Of each prompt's candidates the `n` of the highest mean log probability, likeliest first."""
    best: list[Choice] = []
    for start in range(0, len(choices), num_candidates):
        ranked = sorted(choices[start : start + num_candidates], key=_mean_logprob, reverse=True)
        best += [replace(choice, index=len(best) + i) for i, choice in enumerate(ranked[:n])]
    return best


def _mean_logprob(choice: Choice) -> float:
    logprobs = [token.logprob for token in choice.tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[SampledToken], offset: int = 0
) -> CompletionLogprobs:
    """The legacy format. Tokens of the same text share an entry, which keeps the likelier's value.

    Args:
        offset: characters of the tokens before these.
    """
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        text = tokenizer.token_text(token.token_id)
        top: dict[str, float] = {}
        for likely in token.top:
            top.setdefault(tokenizer.token_text(likely.token_id), likely.logprob)
        if token.logprob is not None:
            top.setdefault(text, token.logprob)
        result.tokens.append(text)
        result.token_logprobs.append(token.logprob)
        result.top_logprobs.append(None if token.logprob is None else top)
        result.text_offset.append(offset)
        offset += len(text)
    return result


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[SampledToken]) -> ChatLogprobs:
    content = []
    for token in tokens:
        own = _entry(tokenizer, token.token_id, token.logprob)
        top = [_entry(tokenizer, likely.token_id, likely.logprob) for likely in token.top]
        content.append(ChatTokenLogprob(**own.model_dump(), top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> TopLogprob:
    """`bytes` is null for a token that is only a part of a character."""
    text = tokenizer.token_text(token_id)
    data = None if "\ufffd" in text else list(text.encode())
    assert logprob is not None
    return TopLogprob(token=text, logprob=logprob, bytes=data)
