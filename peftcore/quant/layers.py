"""What quantized linear layers there are, and their weights as floats: ours and bitsandbytes'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.quant.library import bitsandbytes, linear_layers
from peftcore.quant.linear import QuantLinear


def is_quantized(module: nn.Module) -> bool:
    """Is this one linear layer over codes?"""
    return isinstance(module, (QuantLinear, *linear_layers()))


def keep_exact(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers compute in evaluation as they do in training.

    On CPUs with AVX512-BF16 they would otherwise repack themselves, for good and with rounded
    scales, at their first call in evaluation mode: what is evaluated is then not what was trained.
    """
    for module in model.modules():
        if isinstance(module, linear_layers()[:1]):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False


def _dequantize_packed(data: Tensor, state: Any) -> Tensor:
    """Of a layer that has repacked itself: 32 rows' codes beside each other, scales transposed."""
    n, k = state.shape
    packed = data.view(-1, 32)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=1).view(n // 32, k // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(n, k).to(torch.int64)
    scales = state.absmax.to(torch.float32).t().repeat_interleave(state.blocksize, dim=1)
    return state.code.to(torch.float32)[codes] * scales


def dequantize(module: nn.Module) -> Tensor:
    """W of a quantized layer as `[out_features, in_features]` float32, in fresh memory."""
    if isinstance(module, QuantLinear):
        return module.dequantize()
    bnb = bitsandbytes()
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        if getattr(weight, "quant_state", None) is None:  # a new head, or not on its device yet
            return weight.detach().to(torch.float32)
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return _dequantize_packed(weight.data, weight.quant_state)
        made: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return made.to(torch.float32)
    assert isinstance(module, bnb.nn.Linear8bitLt)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = module.state.SCB
    if scales is None:  # a new head, or not moved to its device yet: still float
        return weight.detach().to(torch.float32)
    codes = weight.data if module.state.CB is None else module.state.CB
    return codes.to(torch.float32) * (scales.to(torch.float32) / 127)[:, None]
