"""The arena: one flat buffer on the device in which every resident adapter owns one range.

An adapter takes exactly its own bytes, whatever its method and ranks: nothing is padded to a
maximum rank, and loading it is one copy. The arena knows ranges; it knows nothing of what is in
them, of adapters, or of who may be evicted.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection

import torch
from torch import Tensor

from peftcore.memory import lazy_zeros

#: Ranges start at multiples of this many elements, so that rows are aligned for vector loads.
ALIGNMENT = 64


def aligned(num_elements: int) -> int:
    """`num_elements` rounded up to the alignment."""
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


class AdapterArena:
    """A first-fit allocator over one tensor. Not thread-safe: one owner.

    Attributes:
        data: the buffer, `[num_elements]`.
    """

    def __init__(
        self, num_elements: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_elements = num_elements // ALIGNMENT * ALIGNMENT
        # Ranges are whole adapters, the lowest first: little of a huge page lies idle.
        self.data: Tensor = lazy_zeros([self.num_elements], dtype, device, huge_pages=True)
        self._used: dict[int, int] = {}  # offset -> aligned length
        self._starts: list[int] = []  # the keys of _used, sorted

    @property
    def num_used(self) -> int:
        """Elements in ranges."""
        return sum(self._used.values())

    @property
    def num_free(self) -> int:
        """Elements in no range, over all gaps."""
        return self.num_elements - self.num_used

    def allocate(self, num_elements: int) -> int | None:
        """Take a range; returns its offset, or None where no gap is large enough."""
        assert num_elements > 0, "an empty range would share its offset with another"
        need = aligned(num_elements)
        end = 0
        for start in [*self._starts, self.num_elements]:
            if start - end >= need:
                self._used[end] = need
                bisect.insort(self._starts, end)
                return end
            if start < self.num_elements:
                end = start + self._used[start]
        return None

    def free(self, offset: int) -> None:
        """Give a range back. Its elements are zeroed: no adapter finds another's weights."""
        length = self._used.pop(offset)
        self._starts.remove(offset)
        self.data[offset : offset + length].zero_()

    def compact(self, fixed: Collection[int] = ()) -> dict[int, int]:
        """Move ranges down to close the gaps between them.

        Args:
            fixed: offsets of ranges that must stay (somebody is writing into them).

        Returns:
            old offset → new offset, of the ranges that moved.
        """
        moved: dict[int, int] = {}
        end = 0
        for start in list(self._starts):
            length = self._used[start]
            if start in fixed or start == end:
                end = start + length
                continue
            self.data[end : end + length] = self.data[start : start + length].clone()
            self.data[max(end + length, start) : start + length].zero_()
            self._used[end] = self._used.pop(start)
            moved[start] = end
            end += length
        self._starts = sorted(self._used)
        return moved

    def check_integrity(self) -> None:
        """Raises AssertionError unless ranges are disjoint and inside, and every gap is zero."""
        assert self._starts == sorted(self._used)
        end = 0
        for start in [*self._starts, self.num_elements]:
            assert start >= end, f"ranges overlap at {start}"
            assert not self.data[end:start].any(), f"the gap at {end} is not zeroed"
            end = start + self._used.get(start, 0)
