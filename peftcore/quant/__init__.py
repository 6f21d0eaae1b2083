"""The quantized base: codes as bitsandbytes makes them, one linear module over them."""

from peftcore.quant.layers import dequantize, is_quantized, keep_exact
from peftcore.quant.library import bitsandbytes
from peftcore.quant.linear import Quantization, QuantLinear, quantize_model

__all__ = [
    "QuantLinear",
    "Quantization",
    "bitsandbytes",
    "dequantize",
    "is_quantized",
    "keep_exact",
    "quantize_model",
]
