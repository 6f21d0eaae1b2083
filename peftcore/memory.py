"""Memory that takes up RAM only while it is used: of pools on a CPU, mapped files, malloc's."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftcore.ops.cpu import kernels

#: glibc's names for `mallopt`, and what `bound_malloc` sets them to.
_MALLOPT = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads
    -3: 4 << 20,  # M_MMAP_THRESHOLD: larger blocks are pages of their own, and go when freed
    -1: 8 << 20,  # M_TRIM_THRESHOLD: most that is kept free at the heap's end
}


def lazy_zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    huge_pages: bool = False,
) -> Tensor:
    """Zeros of `shape`; a pool's size is then a limit, and its use is what it costs.

    On a CPU they are fresh pages of the operating system, which keeps no RAM for a page before it
    is first written to; `torch.zeros` writes to all. Elsewhere they are torch's own.

    Args:
        huge_pages: ask for pages of 2 MiB, where there are such: faster to read, and right for what
            is filled from one end, but what is written to here and there takes up much more.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, num_bytes)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


class MappedFiles:
    """What this process has mapped of the files in a folder, as loaded checkpoints are.

    A page of a mapped file takes up RAM from when it is first read. There is none where the system
    does not tell: Linux does, in /proc/self/maps.
    """

    def __init__(self, folder: Path) -> None:
        files = {str(path.resolve()) for path in folder.iterdir()}
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            lines = []
        mapped = [line.split(maxsplit=5) for line in lines]
        self._ranges = [
            tuple(int(end, 16) for end in fields[0].split("-"))
            for fields in mapped
            if len(fields) == 6 and fields[5] in files
        ]

    def release(self) -> None:
        """Give back the RAM of pages that were read; those that are read again come back.

        Nothing may have been written to them: that would be lost.
        """
        for start, end in self._ranges:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
            )


def bound_malloc() -> None:
    """Bound what this process's malloc keeps of freed memory; before other threads have begun.

    glibc gives every thread a heap, each keeps what it once held, and the more the larger a block
    was ever freed: threads that load and check adapters kept a quarter of a gigabyte. With other C
    libraries nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def align_by_malloc() -> None:
    """Keep the heap from growing to twice what it holds while tensors come and go, as it does where
    torch asks glibc for aligned memory; see `ops/cpu/allocator.h`. Without kernels nothing changes.
    """
    if kernels() is not None:
        kernels().allocate_by_malloc()


def trim_malloc() -> None:
    """Give back what glibc's malloc keeps between blocks in use; takes a few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
