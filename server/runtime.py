"""The asynchronous front of the engine's thread.

Requests go in by a queue of commands; what each step yields comes back to the event loop once a
step. The thread owns the engine; nothing else touches it while it runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from server.adapters.manager import AdapterManager, Lease
from server.engine.engine import Engine, StepOutput
from server.engine.sequence import SampledToken, SamplingParams, Sequence
from server.errors import BadRequest, ContextTooLong, ServerError, Unavailable
from server.tokenization import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChoiceDelta:
    """What one step adds to one choice. `num_cached_tokens` of the prompt came from the cache."""

    index: int
    text: str
    tokens: Seq[SampledToken]
    finish_reason: Literal["stop", "length"] | None
    num_cached_tokens: int


class _Channel:
    """The event loop's end of one request."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[StepOutput | None] = asyncio.Queue()


class Runtime:
    """A loaded model with its engine, adapters and tokenizer; what the HTTP layer talks to.

    Attributes:
        base_name: the base model's name in requests.
        created: when it was loaded, in seconds since the epoch.
        max_model_len: longest context in tokens.
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
        max_upload: int,
    ) -> None:
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.base_name = base_name
        self.created = int(time.time())
        self.max_model_len = max_model_len
        self.max_upload = max_upload
        self.facts = dict(facts)
        self.engine = engine
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failure: BaseException | None = None
        self._channels: dict[str, _Channel] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- the event loop's side -------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the engine's thread and write what is pending."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
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
        """
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
        self._command(lambda: self.engine.add(*sequences))
        num_left = n
        try:
            while num_left:
                output = await channel.queue.get()
                if output is None:
                    raise Unavailable("the engine has stopped")
                if output.error is not None:
                    if isinstance(output.error, ServerError):
                        raise output.error
                    raise ServerError(
                        "the request failed; the server's log has the details"
                    ) from output.error
                num_left -= output.finish_reason is not None
                yield ChoiceDelta(
                    output.key[1],
                    output.text,
                    () if output.token is None else (output.token,),
                    output.finish_reason,  # type: ignore[arg-type]
                    output.num_cached_tokens,
                )
        finally:
            del self._channels[request_id]
            if num_left:
                self._command(lambda: self.engine.abort(request_id))

    def _check(self, prompt: Seq[int], params: SamplingParams, lease: Lease) -> None:
        if self._failure is not None:
            raise Unavailable(f"the engine has stopped: {self._failure}")
        if not prompt:
            raise BadRequest("the prompt is empty", param="prompt")
        vocab = self.facts["vocab_size"]
        outside = next((t for t in [*prompt, *params.stop_token_ids] if not 0 <= t < vocab), None)
        if outside is not None:
            raise BadRequest(
                f"token id {outside} is outside the vocabulary of {vocab}", param="prompt"
            )
        num_prompt = len(prompt) + lease.num_virtual_tokens
        if num_prompt + params.max_tokens > self.max_model_len:
            raise ContextTooLong(num_prompt, params.max_tokens, self.max_model_len)

    def status(self) -> dict[str, Any]:
        """What /health says. Raises Unavailable when the engine has stopped."""
        if self._failure is not None or not self._thread.is_alive():
            raise Unavailable(f"the engine has stopped: {self._failure}")
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
            "num_adapter_loads": cache.stats.num_loads,
            "num_adapter_evictions": cache.stats.num_evictions,
            "num_adapter_failures": cache.stats.num_failures,
            "adapter_load_seconds": cache.stats.load_seconds,
            "adapter_device_bytes": cache.arena.num_used * cache.arena.data.element_size(),
            "adapter_device_capacity_bytes": cache.arena.data.nbytes,
            "adapter_host_bytes": cache.host.num_bytes,
        }

    def wake(self) -> None:
        """There may be something to do for the engine; from any thread."""
        self._wake.set()

    def forget(self, digest: str) -> None:
        """An adapter is gone for good; from any thread."""
        self._command(lambda: self.engine.cache.drop(digest))

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


__all__ = ["ChoiceDelta", "Runtime"]
