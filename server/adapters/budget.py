"""The device memory that adapters share: what each takes of it, and whether they fit together.

Knows records; nothing of names, or of what is resident.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peftcore.arena import aligned
from server.adapters.store import AdapterRecord
from server.errors import Conflict, TooLarge


class Budget:
    """
    Args:
        num_bytes: of the arena.
        dtype: how adapters are packed, as for `pack`.
    """

    def __init__(self, num_bytes: int, dtype: torch.dtype) -> None:
        self.num_bytes = num_bytes
        self._dtype = dtype

    def bytes_of(self, record: AdapterRecord) -> int:
        """Of one adapter's packed form."""
        return record.packed_size.num_bytes(self._dtype)

    def need(self, records: Iterable[AdapterRecord]) -> int:
        """Bytes of the arena that adapters take together."""
        return sum(aligned(self.bytes_of(record)) for record in records)

    def check_upload(self, record: AdapterRecord) -> None:
        """Raises TooLarge unless the adapter fits when it is alone."""
        num_bytes = self.bytes_of(record)
        if num_bytes > self.num_bytes:
            raise TooLarge(
                f"weights: the adapter takes {num_bytes} bytes, but the adapters' memory is "
                f"{self.num_bytes} bytes (--adapter-memory)",
                param="weights",
                code="adapter_too_large",
            )

    def check_mixture(self, records: Iterable[AdapterRecord]) -> None:
        """Raises TooLarge unless a mixture's adapters and the pinned ones fit together."""
        total = self.need(records)
        if total > self.num_bytes:
            raise TooLarge(
                f"adapters: with those that are pinned {total} bytes, but the adapters' memory is "
                f"{self.num_bytes} bytes (--adapter-memory)",
                param="adapters",
                code="adapter_too_large",
            )

    def check_pins(self, pinned: Iterable[AdapterRecord], others: Iterable[AdapterRecord]) -> None:
        """Raises Conflict unless each of the others fits beside all that are pinned."""
        held = self.need(pinned)
        largest = max((self.need([record]) for record in others), default=0)
        if held and held + largest > self.num_bytes:
            raise Conflict(
                f"pinned adapters would take {held} of the {self.num_bytes} bytes of the "
                f"adapters' memory (--adapter-memory), and the largest other one {largest} bytes",
                code="adapter_memory_full",
            )


__all__ = ["Budget"]
