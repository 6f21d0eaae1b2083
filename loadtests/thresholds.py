"""What a run must keep to, so as not to fail. Knows no files and no processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Threshold:
    """One bound, and what was found.

    Attributes:
        value: None where nothing was measured, which keeps to no bound.
        at_most: whether `limit` is the largest that is allowed, or else the smallest.
    """

    name: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def kept(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:.4g}"
        sign = "≤" if self.at_most else "≥"
        return f"{'kept' if self.kept else 'BROKEN'}: {self.name} {value} {sign} {self.limit:g}"


def check(
    steps: Sequence[Mapping[str, Any]],
    *,
    max_failure_ratio: float,
    max_ttft_p95: float | None,
    min_tokens_per_second: float | None,
    max_memory_growth: float | None,
) -> list[Threshold]:
    """The thresholds over a run's steps; None for one that is not asked for.

    failure ratio       failures of any kind of request but 429 / all requests, of the run
    TTFT p95, s         of every step, the worst
    output tokens/s     of the best step
    memory growth, MB   of the longest step, from its second quarter to its last
    """
    num_requests = sum(step["num_requests"] for step in steps)
    num_failures = sum(step["num_failures"] for step in steps)
    ratio = num_failures / num_requests if num_requests else None
    found = [Threshold("failure ratio", ratio, max_failure_ratio)]
    if max_ttft_p95 is not None:
        times = [step.get("ttft_p95_s") for step in steps]
        worst = None if None in times else max(times, default=None)  # type: ignore[type-var]
        found.append(Threshold("TTFT p95, s", worst, max_ttft_p95))
    if min_tokens_per_second is not None:
        best = max((step.get("output_tokens_per_s", 0.0) for step in steps), default=None)
        found.append(Threshold("output tokens/s", best, min_tokens_per_second, at_most=False))
    if max_memory_growth is not None:
        longest = max(steps, key=lambda step: step["end_s"] - step["start_s"], default=None)
        growth = None if longest is None else longest["memory_growth_mb"]
        found.append(Threshold("memory growth, MB", growth, max_memory_growth))
    return found


def saturation(points: Sequence[tuple[int, float]], min_gain: float) -> int | None:
    """The users from which on throughput grows by less than `min_gain`, a share; None if never.

    Args:
        points: users and throughput, of growing loads.
    """
    for (users, before), (_, after) in itertools.pairwise(points):
        if after < before * (1 + min_gain):
            return users
    return None
