"""The quantized base: codes as bitsandbytes makes them, one linear module over them."""

from peftcore.quant.layers import dequantize, is_quantized, keep_exact
from peftcore.quant.library import bitsandbytes
from peftcore.quant.linear import (
    Activations,
    Quantization,
    QuantLinear,
    fast_activations,
    quantize_model,
    round_activations,
)
from peftcore.quant.stored import adopt_codes, stored_quantization

__all__ = [
    "Activations",
    "QuantLinear",
    "Quantization",
    "adopt_codes",
    "bitsandbytes",
    "dequantize",
    "fast_activations",
    "is_quantized",
    "keep_exact",
    "quantize_model",
    "round_activations",
    "stored_quantization",
]
