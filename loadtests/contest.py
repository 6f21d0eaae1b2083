"""Who computes the same thing faster: contenders timed in turns, and tables of what came out.

Weights are cold: a contender has so many copies of what it reads that together they fill more than
a cache, and calls go round them. Knows nothing of what is computed.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loadtests.machine import Watch

#: Bytes that a contender's copies fill at least, so that none is in a cache when its turn comes.
COLD_BYTES = 64 << 20
#: Calls are timed in groups of about this long: a clock and one call's luck count for little.
_GROUP_SECONDS = 0.008
#: Four bits a weight make an error of about a tenth.
_MAX_ERROR = 0.25
#: Repeats that even the slowest contender gets.
MIN_REPEATS = 3


def num_copies(num_bytes: float) -> int:
    """Of something of this size, to be cold."""
    return max(1, math.ceil(COLD_BYTES / num_bytes))


def copies_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Enough copies of tensors that one call reads together; the first are the given ones."""
    count = num_copies(sum(t.nbytes for t in tensors))
    return [list(tensors), *([t.clone() for t in tensors] for _ in range(count - 1))]


class Unavailable(Exception):
    """This contender cannot be had here; the message says why."""


@dataclass
class Contender:
    """One way to compute something.

    Attributes:
        calls: each over its own copy of the weights; None for one that is not available.
        num_bytes: cold bytes that one call reads.
        error: of the result, relative to the exact one; None if not looked at.
        note: why it is not available, or what is to be known of it.
    """

    name: str
    calls: Sequence[Callable[[], Any]] | None
    num_bytes: float = 0.0
    error: float | None = None
    note: str = ""
    _turns: Iterator[Callable[[], Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._turns = itertools.cycle(self.calls or ())

    @classmethod
    def make(cls, name: str, build: Callable[[], Contender]) -> Contender:
        """What `build` makes, or a contender that is not available."""
        try:
            return build()
        except (Unavailable, AttributeError, NotImplementedError, RuntimeError) as exc:
            reason = (str(exc).splitlines() or [type(exc).__name__])[0]
            return cls(name, None, note=reason[:150])

    def seconds(self, num_calls: int) -> float:
        """Of one call, over so many that go on where the last ones stopped."""
        calls = list(itertools.islice(self._turns, num_calls))
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / num_calls


@dataclass(frozen=True)
class Timing:
    """Of one call: the median over repeats, and the fastest of them."""

    seconds: float
    best_seconds: float
    repeats: int


def race(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    max_seconds: float,
    watch: Watch | None = None,
) -> dict[str, Timing]:
    """Time the contenders that are available, in turns and every other round backwards.

    Args:
        max_seconds: for one contender; a slow one gets fewer repeats, but at least `MIN_REPEATS`.
        watch: rounds in which others took the cores are run again.
    """
    watch = watch or Watch(0)
    plans: dict[str, tuple[int, int]] = {}
    running = [c for c in contenders if c.calls]
    for c in running:
        first = c.seconds(1)  # whatever is made at a first call does not count
        once = first if first > max_seconds / MIN_REPEATS else c.seconds(1)
        plans[c.name] = plan(once, len(c.calls or ()), repeats, max_seconds)
    found: dict[str, list[float]] = {c.name: [] for c in running}
    for i in range(repeats):
        order = [c for c in running if i < plans[c.name][1]]
        if i % 2:
            order.reverse()
        while True:
            watch.begin()
            seconds = {c.name: c.seconds(plans[c.name][0]) for c in order}
            if not watch.disturbed():
                break
        for name, value in seconds.items():
            found[name].append(value)
    return {
        name: Timing(statistics.median(values), min(values), len(values))
        for name, values in found.items()
    }


def plan(once: float, copies: int, repeats: int, max_seconds: float) -> tuple[int, int]:
    """Calls of a repeat, and how many repeats, where one call takes `once` seconds.

    No more calls than there are copies: each is cold.
    """
    num_calls = min(copies, max(1, math.ceil(_GROUP_SECONDS / once)))
    affordable = int(max_seconds / (num_calls * once))
    return num_calls, min(repeats, max(MIN_REPEATS, affordable))


def figures(timing: Timing, flop: float, num_bytes: float) -> dict[str, float]:
    """In milliseconds and 10⁹ a second; with what it was for, so that limits can be put to it."""
    return {
        "ms": timing.seconds * 1e3,
        "best_ms": timing.best_seconds * 1e3,
        "repeats": timing.repeats,
        "flop": flop,
        "bytes": num_bytes,
        "gflops": flop / timing.seconds / 1e9,
        "read_gb": num_bytes / timing.seconds / 1e9,
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖.

    Raises AssertionError for one that no rounding explains: a contender that computes something
    else is a mistake of ours.
    """
    error = float((found.double() - exact).norm() / exact.norm())
    if not error < _MAX_ERROR:
        raise AssertionError(f"a relative error of {error:.2g}")
    return error


# -- tables ----------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits, or a dash for what there is not."""
    if value is None:
        return "-"
    size = abs(value)
    digits = 0 if size >= 100 or size == 0 else 2 - math.floor(math.log10(size))
    return f"{value:.{min(digits, 5)}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    lines = [titles, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
