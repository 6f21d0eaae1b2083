"""Matrices in tiles of sixteen outputs: the order in which the CPU kernels read them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

#: Outputs of a tile.
TILE = 16


def num_tiles(out: int) -> int:
    return -(-out // TILE)


def tiled(rows: Tensor) -> Tensor:
    """`[out, n]` → `[tiles, n, 16]`, filled up with zeros, in fresh memory."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
    return padded.view(-1, TILE, rows.shape[1]).transpose(1, 2).contiguous()


def untiled(tiles: Tensor, out: int) -> Tensor:
    """`[tiles, n, 16]` → `[out, n]`."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:out]
