"""Checkpoints that were saved quantized: bitsandbytes' nf4 and int8 codes are taken as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from peftcore.errors import UnsupportedError
from peftcore.quant.codes import BLOCK
from peftcore.quant.library import bitsandbytes, linear_layers
from peftcore.quant.linear import Quantization, QuantLinear

_FIELD = "quantization_config"
_INSTEAD = "serve the model's float weights with --quantization nf4 or int8"


def stored_quantization(config: PretrainedConfig) -> Quantization | None:
    """How the checkpoint of this config was quantized; None where its weights are floats.

    Raises:
        UnsupportedError: in a way that is not served.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    about: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = about.get("quant_method")
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise UnsupportedError(
            _FIELD,
            f"the checkpoint is quantized by {method}; only bitsandbytes' nf4 and int8 are served: "
            f"{_INSTEAD}",
        )
    if about.get("load_in_8bit"):
        if about.get("llm_int8_has_fp16_weight"):
            raise UnsupportedError(_FIELD, f"llm_int8_has_fp16_weight is not served: {_INSTEAD}")
        return "int8"
    kind = about.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UnsupportedError(
            _FIELD, f"bnb_4bit_quant_type {kind} is not served, of 4 bits only nf4: {_INSTEAD}"
        )
    return "nf4"


def adopt_codes(model: PreTrainedModel, after_each: Callable[[], object] = lambda: None) -> bool:
    """Put a `QuantLinear` over the same codes in the place of every layer of bitsandbytes.

    Double quantization is undone: it is of the scales, not of the weights. The outliers' threshold
    of 8-bit layers is left out, as everywhere here.

    Args:
        model: loaded from a checkpoint that `stored_quantization` takes; changed in place.
        after_each: called when a layer's own tensors are not read any more.

    Returns:
        Was there any?

    Raises:
        UnsupportedError: names the layer.
    """
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, linear_layers())]
    for path, module in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _adopted(path, module))
        after_each()
    return bool(found)


@torch.no_grad()
def _adopted(path: str, layer: Any) -> QuantLinear:
    """`layer` is one of `linear_layers()`."""
    shape = (layer.out_features, layer.in_features)
    bias = None if layer.bias is None else layer.bias.data
    has_4_bits = isinstance(layer, linear_layers()[0])
    if not has_4_bits:
        if layer.weight.dtype != torch.int8:
            raise UnsupportedError(path, f"its weight is {layer.weight.dtype}, not int8 codes")
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return QuantLinear.from_codes(
            layer.weight.data, scales.to(torch.float32), bias, shape, "int8"
        )
    state = layer.weight.quant_state
    if state is None:
        raise UnsupportedError(path, "its weight has no codes")
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        raise UnsupportedError(
            path,
            f"{state.quant_type} in blocks of {state.blocksize} is not served, only nf4 in blocks "
            f"of {BLOCK}: {_INSTEAD}",
        )
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes().functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # The codes may be stored as numbers of another type: its bytes are meant.
    codes = layer.weight.data.reshape(-1).view(torch.uint8)[:, None]
    return QuantLinear.from_codes(codes, absmax.to(torch.float32), bias, shape, "nf4")


__all__ = ["adopt_codes", "stored_quantization"]
