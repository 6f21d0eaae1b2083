"""bitsandbytes' codes in the order in which the CPU kernels read them: tiles of sixteen outputs."""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.ops.tiles import TILE, tiled


def can_pack(quantization: str, in_features: int, block_size: int) -> bool:
    """Do an nf4 weight's inputs come in eights, with no block's border within one?"""
    return quantization == "int8" or gcd(in_features, block_size) % 8 == 0


def pack_int8(codes: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """codes `[out, in]` int8, absmax `[out]` → codes `[tiles, in/4, 16, 4]`, scales `[tiles, 16]`.

    Outputs and inputs are filled up with zeros.
    """
    padded = F.pad(codes, (0, -codes.shape[1] % 4, 0, -len(codes) % TILE))
    quads = padded.view(-1, TILE, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return quads, tiled(absmax[:, None] / 127).squeeze(1)


def unpack_int8(codes: Tensor, out_features: int, in_features: int) -> Tensor:
    """The codes `[out, in]` that `pack_int8` was given."""
    rows = codes.transpose(1, 2).reshape(-1, 4 * codes.shape[1])
    return rows[:out_features, :in_features]


def pack_nf4(
    codes: Tensor, absmax: Tensor, out_features: int, in_features: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """bitsandbytes' nf4 codes and scales in tiles.

    Args:
        codes: uint8, two weights a byte, the first of them in the high bits, row after row.
        absmax: float32, a scale for every `block_size` weights, which may go over a row's end.

    Returns:
        codes `[tiles, in/8, 16, 4]` uint8, of eight inputs the first four in the low bits; scales
        `[tiles, groups, 16]` float32, for groups of inputs that no block's border divides.
    """
    pairs = codes.view(-1)[: out_features * in_features // 2].view(out_features, in_features // 2)
    padded = F.pad(pairs, (0, 0, 0, -out_features % TILE))
    eights = torch.stack((padded >> 4, padded & 15), -1).view(-1, TILE, in_features // 8, 2, 4)
    tiles = (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2).contiguous()
    group = gcd(in_features, block_size)
    firsts = torch.arange(0, out_features * in_features, group, device=codes.device)
    return tiles, tiled(absmax[firsts // block_size].view(out_features, -1))
