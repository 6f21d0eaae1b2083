"""The paged KV cache's memory: per layer one tensor of slots. Knows nothing of sequences.

Slot `block * block_size + offset` holds one position's key and value in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVPool:
    """Keys `[num_slots, num_kv_heads, head_dim]` and values `[.., v_head_dim]` for every layer."""

    def __init__(
        self,
        kv_shapes: Sequence[tuple[int, int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = num_blocks * block_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for num_heads, head_dim, v_head_dim in kv_shapes:
            self.keys.append(torch.zeros(slots, num_heads, head_dim, dtype=dtype, device=device))
            self.values.append(
                torch.zeros(slots, num_heads, v_head_dim, dtype=dtype, device=device)
            )

    @staticmethod
    def block_bytes(
        kv_shapes: Sequence[tuple[int, int, int]], block_size: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers."""
        elements = sum(heads * (dk + dv) for heads, dk, dv in kv_shapes)
        return elements * block_size * dtype.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys `[n, heads, head_dim]` and values into `slots` `[n]`."""
        self.keys[layer].index_copy_(0, slots, keys.to(self.keys[layer].dtype))
        self.values[layer].index_copy_(0, slots, values.to(self.values[layer].dtype))
