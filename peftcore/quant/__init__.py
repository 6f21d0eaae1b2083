"""The quantized base: codes by bitsandbytes, one linear module over them."""

from peftcore.quant.linear import Quantization, QuantLinear, quantize_model

__all__ = ["QuantLinear", "Quantization", "quantize_model"]
