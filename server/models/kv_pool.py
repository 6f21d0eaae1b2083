"""The paged KV cache's memory: per layer one tensor of blocks. Knows nothing of sequences.

Slot `block * block_size + offset` holds one position's key and value in every layer. A block's keys
lie transposed, so that the CPU kernels read one value of many positions at once. A block takes up
RAM from when it is first used, in small pages: it is a few kilobytes in each of many tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.memory import lazy_zeros


class KVPool:
    """Keys `[num_blocks, num_kv_heads, head_dim, block_size]` and values `[num_blocks,
    num_kv_heads, block_size, v_head_dim]` for every layer."""

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
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for num_heads, head_dim, v_head_dim in kv_shapes:
            keys = (num_blocks, num_heads, head_dim, block_size)
            values = (num_blocks, num_heads, block_size, v_head_dim)
            self.keys.append(lazy_zeros(keys, dtype, device))
            self.values.append(lazy_zeros(values, dtype, device))

    @staticmethod
    def block_bytes(
        kv_shapes: Sequence[tuple[int, int, int]], block_size: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers."""
        elements = sum(heads * (dk + dv) for heads, dk, dv in kv_shapes)
        return elements * block_size * dtype.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys `[n, heads, head_dim]` and values into `slots` `[n]`.

        What the pool's dtype cannot hold becomes its largest number, not infinite.
        """
        block, place = slots // self.block_size, slots % self.block_size
        dtype = self.keys[layer].dtype
        most = torch.finfo(dtype).max
        self.keys[layer][block, :, :, place] = keys.clamp(-most, most).to(dtype)
        self.values[layer][block, :, place] = values.clamp(-most, most).to(dtype)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[n, heads, head_dim]` and values of `slots` `[n]`, in fresh memory."""
        block, place = slots // self.block_size, slots % self.block_size
        return self.keys[layer][block, :, :, place], self.values[layer][block, :, place]
