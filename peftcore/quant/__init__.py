"""The quantized base: codes by bitsandbytes, one linear module over them."""

import logging

# On some CPUs its import warns of an optional kernel that is not there; it is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from peftcore.quant.layers import dequantize, is_quantized, keep_exact  # noqa: E402
from peftcore.quant.linear import (  # noqa: E402
    Activations,
    Quantization,
    QuantLinear,
    fast_activations,
    quantize_model,
    round_activations,
)

__all__ = [
    "Activations",
    "QuantLinear",
    "Quantization",
    "dequantize",
    "fast_activations",
    "is_quantized",
    "keep_exact",
    "quantize_model",
    "round_activations",
]
