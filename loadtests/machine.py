"""What this machine could do at best: `python -m loadtests.machine`

Two limits, measured, for a number of threads: gigabytes read a second, by torch's sums over memory
that fits in no cache, and float32 GFLOP/s, by oneDNN's matmul over a weight in its own order. Each
is the best of many short runs, since whatever else runs here can only take away. A kernel's limit
is the later of the two: its bytes at the one, its arithmetic at the other.

    python -m loadtests.machine --threads 1
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

_STAT = Path("/proc/stat")
#: Of other processes: fewer cores than that disturb no measurement. Its clock ticks in 10 ms.
_QUIET_CORES = 0.25
_POLL_SECONDS = 0.25
_READ_BYTES = 256 << 20
#: Square matmuls: small ones end before a thread is put aside, large ones lose less at their ends.
_MATMUL_SIZES = (768, 1024, 1536)


@dataclass(frozen=True)
class Limits:
    """Of one number of threads.

    Attributes:
        gflops: float32 multiplications and additions, 10⁹ a second.
        read_gb: bytes read from memory, 10⁹ a second.
    """

    threads: int
    gflops: float
    read_gb: float

    def seconds(self, flop: float, num_bytes: float) -> float:
        """The least that so much arithmetic over so many cold bytes takes here."""
        return max(flop / self.gflops, num_bytes / self.read_gb) / 1e9

    def best_of(self, other: Limits) -> Limits:
        """Of two measurements, each limit's better one."""
        gflops, read_gb = max(self.gflops, other.gflops), max(self.read_gb, other.read_gb)
        return Limits(self.threads, gflops, read_gb)


class Watch:
    """Whether other processes take the cores, which makes every figure a figure of theirs.

    Where there is no /proc/stat nothing is ever seen.

    Attributes:
        patience: seconds that may still be spent on waiting for a quiet machine.
        num_disturbed: answers that there was no patience left to act on.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.num_disturbed = 0
        self._mark = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """The clock, and the core-seconds that others have used, a hypervisor's included."""
        clock = time.perf_counter()
        try:
            fields = _STAT.read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return clock, 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return clock, busy - time.process_time()

    def others(self) -> float:
        """Cores that others have used since the last call of this or of `begin`."""
        last, self._mark = self._mark, self._now()
        return max(0.0, (self._mark[1] - last[1]) / max(self._mark[0] - last[0], 1e-9))

    def begin(self) -> None:
        self._mark = self._now()

    def disturbed(self) -> bool:
        """Is what was measured since `begin` to be measured anew? Waits until it is quiet."""
        if self.others() < _QUIET_CORES:
            return False
        start = time.perf_counter()
        while self.patience > 0:
            time.sleep(_POLL_SECONDS)
            self.patience -= time.perf_counter() - start
            start = time.perf_counter()
            if self.others() < _QUIET_CORES:
                return True
        self.num_disturbed += 1
        return False


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """torch's threads, as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_of(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, after one that does not count."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def measure_limits(threads: int, watch: Watch | None = None, repeats: int = 20) -> Limits:
    """Takes about a second; longer where `watch` finds others busy."""
    watch = watch or Watch(0)
    with num_threads(threads), torch.inference_mode():
        while True:
            watch.begin()
            found = Limits(threads, _gflops(repeats), _read_gb(repeats))
            if not watch.disturbed():
                return found


def _read_gb(repeats: int) -> float:
    data = torch.ones(_READ_BYTES // 4)
    readers = (data.sum, data.view(torch.int64).sum, lambda: torch.dot(data, data))
    seconds = min(best_of(read, repeats) for read in readers)
    return _READ_BYTES / seconds / 1e9


def _gflops(repeats: int) -> float:
    found = []
    for size in _MATMUL_SIZES:
        x, weight = torch.randn(size, size), torch.randn(size, size)
        multiply = prepacked(weight, size) or partial(torch.mm, weight)
        seconds = best_of(partial(multiply, x), repeats)
        found.append(2 * size**3 / seconds / 1e9)
    return max(found)


def prepacked(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """x → x Wᵀ by oneDNN over a copy of W `[out, in]` in the order that it likes for so many rows.

    None where this torch has no such operator.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, None, "none", [], "")


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.machine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    limits = measure_limits(parser.parse_args().threads)
    print(f"{limits.threads} threads: {limits.gflops:.0f} GFLOP/s, {limits.read_gb:.1f} GB/s read")


if __name__ == "__main__":
    main()
