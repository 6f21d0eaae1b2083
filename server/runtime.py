"""The asynchronous front of the engine's thread.

Requests go in by a queue of commands; what each step yields comes back to the event loop once a
step. The thread owns the engine; nothing else touches it while it runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from server.adapters.manager import AdapterManager, Lease
from server.engine.engine import Engine, StepOutput
from server.engine.grammars import Grammars
from server.engine.sequence import PoolingParams, SampledToken, SamplingParams, Sequence
from server.errors import (
    BadRequest,
    ContextTooLong,
    DeadlineExceeded,
    QueueFull,
    ServerError,
    Unavailable,
)
from server.metrics import AdapterUsage
from server.tokenization import Tokenizer

logger = logging.getLogger(__name__)

#: The longest time, in seconds, that a client is told to stay away when the queue is full.
_MAX_RETRY_AFTER = 60


@dataclass(frozen=True)
class Pooled:
    """What one input was pooled to: `values` `[dim]`, `[labels]` or `[tokens, labels]`, a tensor;
    `num_cached_tokens` of it came from the cache."""

    values: Any
    num_cached_tokens: int


@dataclass(frozen=True)
class TextTokens:
    """One input. Token type ids tell two texts apart; None for one text."""

    token_ids: list[int]
    token_type_ids: list[int] | None = None


@dataclass(frozen=True)
class ChoiceDelta:
    """What one step adds to one choice. `num_cached_tokens` of the prompt came from the cache.

    `prompt`, in the first one, has the prompt's tokens from the second on, where they were asked.
    """

    index: int
    text: str
    tokens: Seq[SampledToken]
    finish_reason: Literal["stop", "length"] | None
    num_cached_tokens: int
    prompt: Seq[SampledToken] = ()


class _Channel:
    """The event loop's end of one request. An error in the queue ends it; None is the engine's."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[StepOutput | ServerError | None] = asyncio.Queue()

    async def next(self) -> StepOutput:
        """Raises Unavailable, and what the request failed by."""
        output = await self.queue.get()
        if output is None:
            raise Unavailable("the engine has stopped")
        if isinstance(output, ServerError):
            raise output
        if output.error is None:
            return output
        if isinstance(output.error, ServerError):
            raise output.error
        message = "the request failed; the server's log has the details"
        raise ServerError(message) from output.error


class Runtime:
    """A loaded model with its engine, adapters and tokenizer; what the HTTP layer talks to.

    Attributes:
        base_name: the base model's name in requests.
        created: when it was loaded, in seconds since the epoch.
        max_model_len: longest context in tokens.
        generates: does the base compute text? Else it is an encoder.
        embedding: how texts are embedded where a request does not say.
        grammars: compiles what a request's text must match.

    Args:
        max_waiting: most sequences beyond those that one step can hold.
        request_timeout: seconds from the start of a request to its end, or None.
        prepare_task: makes what a task's adapters need, so that no step waits for it.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterManager,
        tokenizer: Tokenizer,
        *,
        base_name: str,
        max_model_len: int,
        facts: Mapping[str, Any],
        max_waiting: int,
        request_timeout: float | None,
        generates: bool,
        prepare_task: Callable[[str], object],
        embedding: PoolingParams,
        grammars: Grammars,
    ) -> None:
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.base_name = base_name
        self.created = int(time.time())
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.request_timeout = request_timeout
        self.facts = dict(facts)
        self.embedding = embedding
        self.generates = generates
        self._prepare_task = prepare_task
        self.engine = engine
        self.grammars = grammars
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failure: BaseException | None = None
        self._channels: dict[str, _Channel] = {}
        self._num_live = 0  # sequences that `generate` has not seen the end of
        self._mean_seconds = 1.0  # of late requests
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- the event loop's side -------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; it begins to load what is pinned."""
        self.keep(self.adapters.pinned())
        self._thread.start()

    def close(self) -> None:
        """Stop the engine's thread and write what is pending."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.grammars.close()
        self.engine.cache.close()
        self.adapters.close()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        lease: Lease,
        *,
        n: int = 1,
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """Generate `n` choices; what each step adds to each. Closing the iterator aborts them.

        Raises, before the first item:
            BadRequest: an empty prompt, or a token outside the vocabulary.
            ContextTooLong: prompt and max_tokens do not fit.
            Unavailable: the engine has stopped.

        Raises, at any time:
            DeadlineExceeded: after `request_timeout` seconds. What ran of it has been aborted.
        """
        self.check_generates(lease)
        self._check(prompt_token_ids, params, lease)
        request_id = uuid.uuid4().hex
        sequences = [
            Sequence(
                (request_id, i),
                prompt_token_ids,
                params,
                adapters=lease.uses,
                num_virtual_tokens=lease.num_virtual_tokens,
                virtual_kv=lease.virtual_kv,
                max_len=self.max_model_len,
            )
            for i in range(n)
        ]
        channel = self._channels[request_id] = _Channel()
        self._num_live += n
        self._command(lambda: self.engine.add(*sequences))
        num_left = n
        start = time.monotonic()
        deadline = self._start_deadline(channel.loop, request_id)
        try:
            while num_left:
                output = await channel.next()
                num_left -= output.finish_reason is not None
                yield ChoiceDelta(
                    output.key[1],
                    output.text,
                    () if output.token is None else (output.token,),
                    output.finish_reason,  # type: ignore[arg-type]
                    output.num_cached_tokens,
                    output.prompt,
                )
            self._mean_seconds += 0.1 * (time.monotonic() - start - self._mean_seconds)
        finally:
            if deadline is not None:
                deadline.cancel()
            del self._channels[request_id]
            self._num_live -= n
            if num_left:
                self._command(lambda: self.engine.abort(request_id))

    async def pool(
        self, inputs: Seq[TextTokens], pooling: PoolingParams, lease: Lease
    ) -> list[Pooled]:
        """Pool every input. A cancelled call aborts them.

        Raises:
            BadRequest: an input that is empty or too long, or holds a token outside the vocabulary.
            Unavailable: the engine has stopped.
            QueueFull: see `check_queue`. DeadlineExceeded: after `request_timeout` seconds.
        """
        self.check_alive()
        self.check_queue()
        if lease.task is not None:
            await asyncio.to_thread(self._prepare_task, lease.task)
        for i, given in enumerate(inputs):
            self._check_input(
                given.token_ids, lease, "input" if len(inputs) == 1 else f"input[{i}]"
            )
        request_id = uuid.uuid4().hex
        sequences = [
            Sequence(
                (request_id, i),
                given.token_ids,
                SamplingParams(),
                adapters=lease.uses,
                num_virtual_tokens=lease.num_virtual_tokens,
                virtual_kv=lease.virtual_kv,
                max_len=self.max_model_len,
                pooling=pooling,
                token_type_ids=given.token_type_ids,
            )
            for i, given in enumerate(inputs)
        ]
        channel = self._channels[request_id] = _Channel()
        self._num_live += len(inputs)
        self._command(lambda: self.engine.add(*sequences))
        results: dict[int, Pooled] = {}
        deadline = self._start_deadline(channel.loop, request_id)
        try:
            while len(results) < len(inputs):
                output = await channel.next()
                results[output.key[1]] = Pooled(output.pooled, output.num_cached_tokens)
        finally:
            if deadline is not None:
                deadline.cancel()
            del self._channels[request_id]
            self._num_live -= len(inputs)
            if len(results) < len(inputs):
                self._command(lambda: self.engine.abort(request_id))
        return [results[i] for i in range(len(inputs))]

    def _check_input(self, token_ids: Seq[int], lease: Lease, param: str) -> None:
        if not token_ids:
            raise BadRequest(f"{param}: empty", param=param)
        vocab = self.facts["vocab_size"]
        outside = next((t for t in token_ids if not 0 <= t < vocab), None)
        if outside is not None:
            raise BadRequest(
                f"{param}: token id {outside} is outside the vocabulary of {vocab}", param=param
            )
        room = self.max_model_len - lease.num_virtual_tokens
        if len(token_ids) > room:
            raise BadRequest(
                f"{param}: {len(token_ids)} tokens, and at most {room} are taken; shorten the text",
                param=param,
                code="context_length_exceeded",
            )

    def check_generates(self, lease: Lease) -> None:
        """Raises BadRequest where what a request names computes no text."""
        if not self.generates:
            reason = f"{self.base_name!r} is an encoder"
        elif lease.task is not None:
            reason = f"{lease.label!r} is a {lease.task} adapter"
        else:
            return
        raise BadRequest(
            f"model: {reason}, which generates no text: use /v1/classify or /v1/embeddings",
            param="model",
            code="model_does_not_generate",
        )

    def _start_deadline(
        self, loop: asyncio.AbstractEventLoop, request_id: str
    ) -> asyncio.TimerHandle | None:
        """One timer a request: it costs the tokens nothing."""
        if self.request_timeout is None:
            return None
        error = DeadlineExceeded(
            f"the request was not finished within request_timeout, {self.request_timeout:g} s; "
            "ask for fewer tokens",
            code="request_timeout",
        )
        return loop.call_later(self.request_timeout, self._abort, request_id, error)

    def _abort(self, request_id: str, error: ServerError) -> None:
        """End a request here and in the engine, though its client may not be reading."""
        self._channels[request_id].queue.put_nowait(error)
        self._command(lambda: self.engine.abort(request_id))

    def abort_all(self, error: ServerError) -> None:
        """End every request with `error`; from the event loop's thread."""
        for request_id in list(self._channels):
            self._abort(request_id, error)

    def check_queue(self) -> None:
        """Raises QueueFull while as many sequences wait as may. A request that finds room is taken
        as a whole, however many sequences it is."""
        num_places = self.engine.scheduler.max_num_seqs
        num_waiting = self._num_live - num_places
        if num_waiting >= self.max_waiting:
            seconds = math.ceil((num_waiting + 1) / num_places * self._mean_seconds)
            raise QueueFull(
                f"{num_waiting} sequences wait, and max_waiting is {self.max_waiting}",
                code="queue_full",
                retry_after=min(max(seconds, 1), _MAX_RETRY_AFTER),
            )

    def _check(self, prompt: Seq[int], params: SamplingParams, lease: Lease) -> None:
        self.check_alive()
        if not prompt:
            raise BadRequest("the prompt is empty", param="prompt")
        vocab = self.facts["vocab_size"]
        biased = (token_id for token_id, _ in params.logit_bias)
        given = [*prompt, *params.stop_token_ids, *biased]
        outside = next((t for t in given if not 0 <= t < vocab), None)
        if outside is not None:
            raise BadRequest(
                f"token id {outside} is outside the vocabulary of {vocab}", param="prompt"
            )
        num_prompt = len(prompt) + lease.num_virtual_tokens
        if num_prompt + params.max_tokens > self.max_model_len:
            raise ContextTooLong(num_prompt, params.max_tokens, self.max_model_len)

    def check_alive(self) -> None:
        """Raises Unavailable when the engine has stopped."""
        if self._failure is not None or not self._thread.is_alive():
            raise Unavailable(f"the engine has stopped: {self._failure}")

    def status(self) -> dict[str, Any]:
        """What /health says. Raises Unavailable when the engine has stopped."""
        self.check_alive()
        return {"status": "ok", **self.facts, **self.stats()}

    def stats(self) -> dict[str, float]:
        """Counts for metrics; each is read on its own, without stopping the engine."""
        engine, cache = self.engine, self.engine.cache
        return {
            "num_running": len(engine.scheduler.running),
            "num_waiting": len(engine.scheduler.waiting),
            "num_preemptions": engine.scheduler.num_preemptions,
            "kv_blocks": engine.blocks.num_blocks,
            "kv_blocks_used": engine.blocks.num_blocks - engine.blocks.num_free,
            "num_prompt_tokens": engine.num_prompt_tokens,
            "num_prefix_hit_tokens": engine.num_prefix_hit_tokens,
            "num_adapter_hits": cache.stats.num_hits,
            "num_adapter_misses": cache.stats.num_misses,
            "num_adapter_loads": cache.stats.num_loads,
            "num_adapter_evictions": cache.stats.num_evictions,
            "num_adapter_failures": cache.stats.num_failures,
            "adapter_load_seconds": cache.stats.load_seconds,
            "adapter_device_bytes": cache.arena.num_used * cache.arena.data.element_size(),
            "adapter_device_capacity_bytes": cache.arena.data.nbytes,
            "adapter_host_bytes": cache.host.num_bytes,
            "adapter_host_capacity_bytes": cache.host.max_bytes,
            "adapter_disk_bytes": self.adapters.file_bytes(),
        }

    def adapter_usage(self) -> AdapterUsage:
        """Which adapters there are, where they lie and which are asked for; from any thread."""
        scheduler = self.engine.scheduler
        names = self.adapters.names_by_digest()

        def names_of(sequences: Iterable[Sequence]) -> list[str]:
            digests = {use.digest for seq in sequences for use in seq.adapters}
            return sorted(name for digest in digests for name in names.get(digest, ()))

        tiers = Counter(self.engine.cache.tier(digest) for digest in names)
        sizes = [self.adapters.budget.bytes_of(record) for record in self.adapters.records()]
        capacity = self.engine.cache.arena.data.nbytes
        return AdapterUsage(
            names=[name for group in names.values() for name in group],
            num_by_tier={tier: tiers[tier] for tier in ("device", "host", "disk")},
            running=names_of(list(scheduler.running)),
            waiting=names_of(list(scheduler.waiting)),
            num_pinned=self.adapters.num_pinned(),
            max_resident=capacity * len(sizes) // sum(sizes) if sizes else scheduler.max_num_seqs,
        )

    def wake(self) -> None:
        """There may be something to do for the engine; from any thread."""
        self._wake.set()

    def forget(self, digest: str) -> None:
        """An adapter is gone for good; from any thread."""
        self._command(lambda: self.engine.cache.drop(digest))

    def keep(self, digests: frozenset[str]) -> None:
        """These adapters are to stay on the device; from any thread."""
        self._command(lambda: self.engine.cache.keep(digests))

    def prefetch(self, digest: str) -> None:
        """Begin to load an adapter, if requests leave room for it; from any thread."""

        def prefetch() -> None:
            self.engine.cache.prefetch(digest)

        self._command(prefetch)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every pool is sound. From any thread; waits for its turn."""
        if not self._thread.is_alive():
            self.engine.check_integrity()
        else:
            done = threading.Event()
            errors: list[AssertionError] = []

            def check() -> None:
                try:
                    self.engine.check_integrity()
                except AssertionError as exc:
                    errors.append(exc)
                finally:
                    done.set()

            self._command(check)
            done.wait()
            if errors:
                raise errors[0]
        self.adapters.check_integrity()

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    # -- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()()
                if not self.engine.has_work:
                    self.engine.cache.poll()
                    self._wake.wait()
                    continue
                outputs = self._step()
                if outputs:
                    self._deliver(outputs)
                elif not self.engine.scheduler.running:
                    self._wake.wait(0.05)  # everything waits for adapters that are loading
        except BaseException as exc:
            logger.exception("the engine has stopped")
            self._failure = exc
        finally:
            for channel in list(self._channels.values()):
                channel.loop.call_soon_threadsafe(channel.queue.put_nowait, None)

    def _step(self) -> list[StepOutput]:
        try:
            return self.engine.step()
        except Exception as exc:
            logger.exception("a step failed; its requests end with an error")
            return self.engine.fail(exc)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Hand a step's outputs over, once for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Channel, StepOutput]]] = {}
        for output in outputs:
            channel = self._channels.get(output.key[0])
            if channel is not None:
                by_loop.setdefault(channel.loop, []).append((channel, output))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[_Channel, StepOutput]]) -> None:
    for channel, output in items:
        channel.queue.put_nowait(output)


__all__ = ["ChoiceDelta", "Pooled", "Runtime", "TextTokens"]
