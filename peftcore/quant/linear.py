"""Linear layers over nf4 and int8 codes: codes as bitsandbytes', one module that multiplies.

    nf4   W ≈ LUT[code] · absmax   per block of 64 weights (QLoRA, arXiv:2305.14314)
    int8  W ≈ code · absmax / 127  per output row (LLM.int8(), arXiv:2208.07339, without outliers)

On CUDA bitsandbytes' own operators multiply. On a CPU they dequantize the whole weight into fresh
memory at each call, so there our kernels multiply; without them a tile of rows at a time is
dequantized into one small buffer that stays in the cache, and torch multiplies the tile. All read
the same codes. Gradients reach the input: the backward pass makes the tiles again, and nothing of
W's size is kept between the passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.ops.cpu import kernels
from peftcore.quant.codes import BLOCK, quantize_int8, quantize_nf4
from peftcore.quant.library import bitsandbytes
from peftcore.quant.packed import can_pack, pack_int8, pack_nf4

Quantization = Literal["nf4", "int8", "none"]
#: What the kernels multiply the codes by: inputs as precise as float32, or rounded to whole
#: numbers, row by row, with a step of its own for every 64 or 128 inputs.
Activations = Literal["float", "int16", "int8"]

#: Dequantized weights per tile: 8 MiB of float32.
_TILE_ELEMENTS = 2 << 20

_scratch = threading.local()


def _tile_buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """This thread's tile, `[numel]` on the CPU; its contents belong to one call."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # else no later call outside it may write
            buffer = _scratch.buffer = torch.empty(max(numel, _TILE_ELEMENTS))
    return buffer.view(dtype)[:numel]


def activation_bits(activations: Activations) -> int:
    """As the kernels' weights take them; float32 as they multiply it fastest on this CPU."""
    if activations == "float":
        return int(kernels().FLOAT_BITS)
    return {"int16": 16, "int8": 8}[activations]


@cache
def _bfloat16_is_fast() -> bool:
    """Does this CPU multiply bfloat16 by instructions of its own?"""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def training_dtype(x: Tensor) -> torch.dtype:
    """What a CPU multiplies in where gradients are wanted; bitsandbytes takes x's own likewise."""
    return x.dtype if x.dtype == torch.bfloat16 and _bfloat16_is_fast() else torch.float32


class QuantLinear(nn.Module):
    """y = W x + b over quantized W.

    x: `[..., in_features]` float; returns `[..., out_features]` in x's dtype.

    Attributes:
        packed: do the kernels multiply, so that the codes lie in tiles?
        codes: nf4 `[out·in/2, 1]` uint8, or int8 `[out, in]`; packed as `quant.packed` says.
        absmax: float32, nf4 `[out·in/64]`, or int8 `[out]`; packed likewise, int8's over 127.
        activations: of a packed layer's `forward` without gradients; `round_activations` sets it.
    """

    codes: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: Quantization) -> None:
        """Quantize `weight` `[out_features, in_features]`, float."""
        super().__init__()
        weight = weight.detach().to(torch.float32).contiguous()
        if quantization == "nf4":
            codes, absmax = quantize_nf4(weight)
        elif quantization == "int8":
            codes, absmax = quantize_int8(weight)
        else:
            raise ValueError(f"quantization: {quantization!r} is not 'nf4' or 'int8'")
        self._take(codes, absmax, bias, weight.shape, quantization)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        quantization: Quantization,
    ) -> QuantLinear:
        """A layer over codes that there are already.

        Args:
            codes, absmax: as bitsandbytes lays them out (see the attributes), int8's absmax as it
                is.
            shape: (out_features, in_features).
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(codes, absmax, bias, shape, quantization)
        return layer

    def _take(
        self,
        codes: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        quantization: Quantization,
    ) -> None:
        self.out_features, self.in_features = shape
        self.quantization = quantization
        self.packed = (
            codes.is_cpu
            and can_pack(quantization, self.in_features, BLOCK)
            and kernels() is not None
        )
        if self.packed and quantization == "nf4":
            codes, absmax = pack_nf4(codes, absmax, self.out_features, self.in_features, BLOCK)
        elif self.packed:
            codes, absmax = pack_int8(codes, absmax)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer(
            "bias", None if bias is None else bias.detach().to(torch.float32).clone()
        )
        self.activations: Activations = "float"
        self._kernel: Any = None
        self._made: dict[Any, Any] = {}  # on a GPU, once for all calls

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": None, "_made": {}}  # of this one's buffers

    @property
    def kernel(self) -> Any:
        """The kernels' view of a packed layer's buffers."""
        if self._kernel is None:
            self._kernel = self._view(self.bias)
        return self._kernel

    def _view(self, bias: Tensor | None) -> Any:
        shape = (self.out_features, self.in_features)
        bits = activation_bits(self.activations)
        return kernels().Weight(self.codes, self.absmax, bias, *shape, activation_bits=bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization}"

    def _columns(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Wᵀ[:, start:stop] without int8's row scale; the result lives until the next call.

        For nf4 `start` is a multiple of the block size, so that blocks are whole.
        """
        k = self.in_features
        if self.packed:
            tile = _tile_buffer((stop - start) * k, dtype).view(k, stop - start)
            kernels().unpack_(self.kernel, start, stop, scaled=False, out=tile)
            return tile
        if self.quantization == "int8":
            tile = _tile_buffer((stop - start) * k, dtype)
            return tile.view(-1, k).copy_(self.codes[start:stop]).t()
        bitsandbytes()
        rows: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes[start * k // 2 : (stop * k + 1) // 2],
            self.absmax[start * k // BLOCK : -(-stop * k // BLOCK)],
            BLOCK,
            "nf4",
            (1, (stop - start) * k),  # flat: its CPU code begins a new block at each row it is told
            dtype,
        )
        return rows.view(-1, k).t()

    @property
    def _row_scale(self) -> Tensor:
        """int8's scale of each output, `[out_features]`."""
        if self.packed:
            return self.absmax.view(-1)[: self.out_features]
        return self.absmax / 127

    def _tile_rows(self) -> int:
        return max(BLOCK, _TILE_ELEMENTS // self.in_features // BLOCK * BLOCK)

    def dequantize(self) -> Tensor:
        """W as `[out_features, in_features]` float32, in fresh memory."""
        if self.codes.is_cuda and self.quantization == "nf4":
            state = self._nf4_state(torch.float32)
            weight: Tensor = bitsandbytes().functional.dequantize_4bit(self.codes, state)
            return weight
        if self.quantization == "int8" and not self.packed:
            return self.codes.to(torch.float32) * self._row_scale[:, None]
        step, n = self._tile_rows(), self.out_features
        tiles = (self._columns(i, min(i + step, n)).t() for i in range(0, n, step))
        weight = torch.empty(n, self.in_features)
        for i, tile in zip(range(0, n, step), tiles, strict=True):
            weight[i : i + step] = tile
        return weight.mul_(self._row_scale[:, None]) if self.quantization == "int8" else weight

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self._forward_cuda(x)
        if x.requires_grad and torch.is_grad_enabled():
            return _Multiply.apply(x, self)
        return self.multiply(x, torch.float32)

    def multiply(self, x: Tensor, dtype: torch.dtype, bias: bool = True) -> Tensor:
        """As `forward`, on a CPU and without gradients: each tile lives until the next."""
        n, step = self.out_features, self._tile_rows()
        rows = x.to(dtype)
        if self.packed and dtype == torch.float32:
            weight = self.kernel if bias or self.bias is None else self._view(None)
            result: Tensor = kernels().linear(rows.detach(), [weight], [-1])[0]
            return result.to(x.dtype)
        if n <= step:
            y = rows @ self._columns(0, n, dtype)
        else:
            y = rows.new_empty(*x.shape[:-1], n)
            for i in range(0, n, step):
                y[..., i : i + step] = rows @ self._columns(i, min(i + step, n), dtype)
        if self.quantization == "int8":
            y.mul_(self._row_scale)
        if bias and self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype)

    def multiply_back(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """grad W, on a CPU.  grad: `[..., out_features]`; returns `[..., in_features]`."""
        n, step = self.out_features, self._tile_rows()
        rows = grad.reshape(-1, n)
        if self.quantization == "int8":
            rows = rows * self._row_scale
        rows = rows.to(dtype)
        back = rows[:, :step] @ self._columns(0, min(step, n), dtype).t()
        if n > step:
            back = back.to(torch.float32)  # a sum of many tiles
        for i in range(step, n, step):
            tile = self._columns(i, min(i + step, n), dtype).t()
            if dtype == torch.float32:
                back.addmm_(rows[:, i : i + step], tile)
            else:
                back += rows[:, i : i + step] @ tile
        return back.view(*grad.shape[:-1], -1).to(grad.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kernel, self._made = None, {}  # the buffers may move
        return super()._apply(*args, **kwargs)

    def _nf4_state(self, dtype: torch.dtype) -> Any:
        """What bitsandbytes' operators are told. Made once: its table of values comes from the
        host, for which the device would wait at each call."""
        state = self._made.get(dtype)
        if state is None:
            functional = bitsandbytes().functional
            with torch.inference_mode(False):  # training may use it too
                code = functional.get_4bit_type("nf4", device=self.absmax.device)
            state = self._made[dtype] = functional.QuantState(
                absmax=self.absmax,
                shape=torch.Size((self.out_features, self.in_features)),
                code=code,
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=dtype,
            )
        return state

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in what a step computes in, made once."""
        if self.bias is None:
            return None
        found = self._made.get(("bias", dtype))
        if found is None:
            with torch.inference_mode(False):
                found = self._made["bias", dtype] = self.bias.to(dtype)
        bias: Tensor = found
        return bias

    def _forward_cuda(self, x: Tensor) -> Tensor:
        bnb = bitsandbytes()
        bias = self._bias_in(x.dtype)
        result: Tensor
        if self.quantization == "nf4":
            result = bnb.matmul_4bit(x, self.codes.t(), self._nf4_state(x.dtype), bias=bias)
            return result
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.threshold = (
            self.codes,
            self.absmax,
            False,
            0.0,
        )
        result = bnb.matmul(x, self.codes, state=state, bias=bias)
        return result


class _Multiply(torch.autograd.Function):
    """`QuantLinear.multiply` with a gradient for x. Saves no tensor: the layer has the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x, training_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.multiply_back(grad, training_dtype(grad)), None


def quantize_model(
    model: PreTrainedModel,
    quantization: Quantization,
    after_each: Callable[[], object] = lambda: None,
    *,
    output_alone: bool = False,
) -> None:
    """Replace every linear layer of `model` by a `QuantLinear`, in place.

    The output embedding is quantized to int8 under either choice: it decides every token, and four
    bits cost more there than they save. A tied input embedding keeps its float weight.

    Args:
        after_each: called when a layer's float weight is not read any more.
        output_alone: the output embedding only: of a model whose other layers have their codes.
    """
    if quantization == "none":
        return
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if output_alone and module is not output:
            continue
        if isinstance(module, nn.Linear):
            weight, bias = module.weight, module.bias
        elif isinstance(module, Conv1D):
            weight, bias = module.weight.t(), module.bias
        else:
            continue
        choice: Quantization = "int8" if module is output else quantization
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QuantLinear(weight, bias, choice))
        after_each()


def fast_activations() -> Activations:
    """The form that this CPU multiplies fastest by, of those that lose next to nothing.

    Processors with instructions for dot products of bytes multiply inputs of sixteen bits, as two
    bytes, faster than floats; others do not.
    """
    found = kernels()
    return "int16" if found is not None and found.BYTE_DOTS else "float"


def round_activations(model: nn.Module, activations: Activations) -> None:
    """Have the kernels multiply so in every packed layer of `model`."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.packed:
            module.activations = activations
            module._kernel = None
