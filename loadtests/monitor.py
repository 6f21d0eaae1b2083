"""Looks at a server all through a run: its memory and its metrics, once in a while."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from clients.client import Client, Retries
from clients.errors import ClientError
from clients.metrics import Snapshot, share
from loadtests.startup import memory


@dataclass(frozen=True)
class Look:
    """
    Attributes:
        seconds: since the monitor began.
        resident_mb: of the server's process, in 10⁶ bytes; None where it is not ours.
        metrics: None where the server did not answer.
    """

    seconds: float
    resident_mb: float | None
    metrics: Snapshot | None


class Monitor:
    """A context manager that looks from a thread, until its end.

    Attributes:
        looks: so far, in order.
    """

    def __init__(self, url: str, pid: int | None, interval: float = 1.0) -> None:
        self.looks: list[Look] = []
        self._url = url
        self._pid = pid
        self._interval = interval
        self._start = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    def between(self, start: float, end: float) -> list[Look]:
        return [look for look in self.looks if start <= look.seconds <= end]

    def _run(self) -> None:
        with Client(self._url, timeout=10, retries=Retries(max_retries=0)) as client:
            while not self._done.is_set():
                resident = None if self._pid is None else memory(self._pid).get("resident_mb")
                try:
                    metrics = Snapshot(client.metrics())
                except (ClientError, ValueError):
                    metrics = None
                self.looks.append(Look(self.seconds(), resident, metrics))
                self._done.wait(self._interval)


def memory_growth(looks: Sequence[Look]) -> float | None:
    """MB from the second quarter of the time to the last, of medians; the first is the warm-up.

    None for fewer than eight looks.
    """
    sizes = [look.resident_mb for look in looks if look.resident_mb is not None]
    if len(sizes) < 8:
        return None
    quarter = len(sizes) // 4
    return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter])


def cache_figures(looks: Sequence[Look]) -> dict[str, float]:
    """What the caches did between the first and the last look; nothing of nothing."""
    seen = [look.metrics for look in looks if look.metrics is not None]
    if len(seen) < 2:
        return {}
    first, last = seen[0], seen[-1]

    def growth(name: str) -> float:
        return last.growth(first, f"polypeft_{name}_total")

    hits, loads = growth("adapter_hits"), growth("adapter_loads")
    found = {
        "adapter_hit_rate": share(hits, hits + loads),
        "adapter_loads": loads,
        "adapter_evictions": growth("adapter_evictions"),
        "prefix_hit_rate": share(growth("prefix_hit_tokens"), growth("prefix_query_tokens")),
        "preemptions": growth("preemptions"),
    }
    return {name: value for name, value in found.items() if value is not None}
