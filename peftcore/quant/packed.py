"""bitsandbytes' codes in the order in which the CPU kernels read them: tiles of sixteen outputs."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from peftcore.ops.tiles import tiled


def can_pack(quantization: str, in_features: int, block_size: int) -> bool:
    """Are an nf4 weight's inputs pairs, and its blocks' borders at even inputs?"""
    return quantization == "int8" or gcd(in_features, block_size) % 2 == 0


def pack_int8(codes: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """codes `[out, in]` int8, absmax `[out]` → codes `[tiles, in, 16]`, scales `[tiles, 16]`."""
    return tiled(codes), tiled(absmax[:, None] / 127).squeeze(1)


def pack_nf4(
    codes: Tensor, absmax: Tensor, out_features: int, in_features: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """bitsandbytes' nf4 codes and scales in tiles.

    Args:
        codes: uint8, two weights a byte, the first of them in the high bits, row after row.
        absmax: float32, a scale for every `block_size` weights, which may go over a row's end.

    Returns:
        codes `[tiles, in/2, 16]` uint8, an even input in the low bits; scales `[tiles, groups, 16]`
        float32, for groups of inputs that no block's border divides.
    """
    pairs = codes.view(-1)[: out_features * in_features // 2].view(out_features, in_features // 2)
    tiles = tiled((pairs >> 4) | (pairs << 4))
    group = gcd(in_features, block_size)
    firsts = torch.arange(0, out_features * in_features, group, device=codes.device)
    return tiles, tiled(absmax[firsts // block_size].view(out_features, -1))
