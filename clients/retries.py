"""When a request is sent again. Knows nothing of what is asked.

Only where the server has done nothing of it: no connection came about, or the server refused with
429 or 503. A stream is past this once its first byte came, so nothing is generated twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from clients.errors import ApiError, ConnectionFailed, RateLimited, Unavailable


@dataclass(frozen=True)
class Retries:
    """How often, and after how long.

    Attributes:
        max_retries: sent again at most so often; 0 never.
        first_wait: seconds before the first retry, where the server names none; each later wait is
            about twice the last.
        max_wait: the longest wait in seconds. A server that asks for a longer one is not asked
            again: its error is raised at once.
    """

    max_retries: int = 2
    first_wait: float = 0.5
    max_wait: float = 60.0

    def retrying(self) -> Retrying:
        """Calls a function until it returns, or raises what no retry helps."""
        return Retrying(
            stop=stop_after_attempt(self.max_retries + 1),
            wait=self._wait,
            retry=retry_if_exception(self.helps),
            reraise=True,
        )

    def async_retrying(self) -> AsyncRetrying:
        """`retrying` of a coroutine function."""
        return AsyncRetrying(
            stop=stop_after_attempt(self.max_retries + 1),
            wait=self._wait,
            retry=retry_if_exception(self.helps),
            reraise=True,
        )

    def helps(self, exc: BaseException) -> bool:
        """Whether the same request may be sent again after this."""
        if isinstance(exc, RateLimited | Unavailable):
            return exc.retry_after is None or exc.retry_after <= self.max_wait
        return isinstance(exc, ConnectionFailed)

    def _wait(self, state: RetryCallState) -> float:
        assert state.outcome is not None
        exc = state.outcome.exception()
        if isinstance(exc, ApiError) and exc.retry_after is not None:
            return exc.retry_after
        grown = wait_exponential_jitter(
            multiplier=self.first_wait, max=self.max_wait, jitter=self.first_wait
        )
        return grown(state)
