"""A weight's nf4 and int8 codes, as bitsandbytes makes them.

On a CPU they are computed here or by our kernels, bit by bit what its operators compute, a part of
the weight at a time. On CUDA its own kernels make them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcore.ops.cpu import kernels
from peftcore.quant.library import bitsandbytes

#: Weights in a block of nf4, which have a scale in common.
BLOCK = 64

#: The values of nf4's sixteen codes (arXiv:2305.14314, appendix E).
_NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
#: Between a code's value and the next one's, what the lower one stands for ends here.
_NF4_BOUNDS = (_NF4[:-1] + _NF4[1:]) / 2

#: Weights that are quantized at a time: whole blocks, in whole bytes.
_CHUNK = 1 << 20


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of sixteen values to every weight / absmax, over blocks of 64.

    Args:
        weight: float32; its blocks go over the ends of rows.

    Returns:
        codes `[⌈n/2⌉, 1]` uint8, the first of two weights in the high bits, and absmax `[⌈n/64⌉]`
        float32.
    """
    if weight.is_cuda:
        codes, state = bitsandbytes().functional.quantize_4bit(
            weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        return codes, state.absmax
    flat = weight.reshape(-1)
    num_blocks, num_left = divmod(flat.numel(), BLOCK)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    scales = torch.empty(num_blocks + (num_left > 0))
    whole = flat[: len(flat) - num_left], codes[: num_blocks * BLOCK // 2], scales[:num_blocks]
    if kernels() is not None:
        kernels().quantize_nf4_(whole[0], _NF4_BOUNDS, *whole[1:])
    else:
        sizes = _CHUNK, _CHUNK // 2, _CHUNK // BLOCK
        parts = [tensor.split(size) for tensor, size in zip(whole, sizes, strict=True)]
        for part, out, absmax in zip(*parts, strict=True):
            blocks = part.view(-1, BLOCK)
            torch.amax(blocks.abs(), dim=1, out=absmax)
            out.copy_(_nf4_codes(blocks * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)))
    if num_left:
        rest = flat[-num_left:]
        scales[-1] = rest.abs().amax().clamp(min=1e-38)
        codes[num_blocks * BLOCK // 2 :] = _nf4_codes(rest / scales[-1])
    return codes.view(-1, 1), scales


def _nf4_codes(scaled: Tensor) -> Tensor:
    """Of values from −1 to 1, two codes a byte; an odd one is followed by that of 0."""
    found = torch.bucketize(scaled.reshape(-1), _NF4_BOUNDS, out_int32=True).to(torch.uint8)
    if len(found) % 2:
        found = torch.cat([found, found.new_tensor([7])])
    return (found[::2] << 4) | found[1::2]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """round(127 · weight / absmax) over each row.

    Args:
        weight: `[out, in]` float32; CUDA's kernel reads it in float16.

    Returns:
        codes `[out, in]` int8 and absmax `[out]` float32.
    """
    if weight.is_cuda:
        codes, absmax, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes, absmax.to(torch.float32)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    absmax = torch.empty(len(weight))
    step = max(1, _CHUNK // weight.shape[1])
    for rows, out, scale in zip(
        weight.split(step), codes.split(step), absmax.split(step), strict=True
    ):
        torch.amax(rows.abs(), dim=1, out=scale)
        out.copy_((rows * (127.0 / scale).unsqueeze(1)).round_())
    return codes, absmax
