"""Zeroed memory for pools, which on a CPU takes up RAM only where it was written to."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


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
