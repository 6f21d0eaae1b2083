"""Folding an adapter into its base's weights, and taking it out again exactly.

Knows one module and the primitives on it. What was there before is kept, so that unmerging restores
the base bit by bit, quantized or not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.base import BaseModel, BaseModule
from peftcore.errors import UnsupportedError
from peftcore.parts import ModulePart, ReplacedModule
from peftcore.primitives import (
    BiasDelta,
    Bottleneck,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    OutputScale,
    Primitive,
    RowOverride,
)
from peftcore.quant import QuantLinear, bitsandbytes, is_quantized


@torch.no_grad()
def merge_parts(module: BaseModule, parts: Sequence[ModulePart]) -> nn.Module:
    """The module with the effects of several adapters' parts in it. Raises as `merged`."""
    for part in parts:
        if isinstance(part, ReplacedModule):  # alone, by `exclusive`
            return copy.deepcopy(part.copy).requires_grad_(False)
    return merged(module, [p for part in parts for p in part.primitives()])


def retie(base: BaseModel, made: Mapping[str, nn.Module]) -> None:
    """Let merged modules whose weights were one and stayed equal share one again."""
    kept: dict[int, nn.Module] = {}
    for path, module in made.items():
        original = base.modules[path].module
        weight = getattr(original, "weight", None)
        other: Any = kept.setdefault(id(weight), module)
        if (
            weight is not None
            and other is not module
            and torch.equal(other.weight, cast(Tensor, module.weight))
        ):
            module.weight = other.weight


def untie(model: PreTrainedModel) -> None:
    """Say so in the config where input and output embeddings are no longer one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    if head is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = head.weight is embedding.weight


@torch.no_grad()
def merged(module: BaseModule, primitives: Sequence[Primitive]) -> nn.Module:
    """A copy of the module that computes what the module and the primitives compute.

    Args:
        module: a linear, norm or embedding module.
        primitives: one adapter's, all of `module`; or of several adapters one after another.

    Raises:
        UnsupportedError: an effect that no weight of this module expresses.
        ValueError: the merged weight is not finite.
    """
    if any(isinstance(p, Bottleneck) for p in primitives):
        raise UnsupportedError(
            "merge", f"the bottleneck at {module.path} is not linear: no weight expresses it"
        )
    if module.kind == "embedding":
        weight, bias = _merged_embedding(module, primitives)
    elif module.is_linear:
        weight, bias = _merged_linear(module, primitives)
    else:
        weight, bias = _merged_norm(module, primitives)
    for name, tensor in [("weight", weight), ("bias", bias)]:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{module.path}.{name}: the merged values are not finite")
    return _with_weights(module, weight, bias)


def _merged_linear(
    module: BaseModule, primitives: Sequence[Primitive]
) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight().clone(), module.bias()
    bias = None if bias is None else bias.clone()
    low_rank = torch.zeros_like(weight)
    v_out = torch.ones(len(weight), device=weight.device)
    for p in primitives:
        if isinstance(p, ModuleOverride):
            weight, bias = p.weight.float().clone(), p.bias
            bias = None if bias is None else bias.float().clone()
    for p in primitives:
        if isinstance(p, LowRank):
            low_rank.addmm_(p.b.float(), p.a.float(), alpha=p.scale)
    weight += low_rank
    for p in primitives:
        if isinstance(p, OutputScale):
            v_out *= p.v
    for p in primitives:
        if isinstance(p, InputScale):
            weight *= p.v
    for p in reversed(primitives):
        if isinstance(p, InputRotation):
            num_blocks, size, _ = p.blocks.shape
            split = weight.view(-1, num_blocks, size)
            weight = torch.einsum("okc,kbc->okb", split, p.blocks.float()).reshape(weight.shape)
    weight *= v_out[:, None]
    if bias is not None:
        bias *= v_out
    for p in primitives:
        if isinstance(p, BiasDelta):
            bias = p.b.clone() if bias is None else bias + p.b
        elif isinstance(p, RowOverride):
            weight[torch.as_tensor(p.ids, device=weight.device)] = p.rows.float()
    return weight, bias


def _merged_embedding(
    module: BaseModule, primitives: Sequence[Primitive]
) -> tuple[Tensor, Tensor | None]:
    weight = module.weight().clone()
    for p in primitives:
        if isinstance(p, ModuleOverride):
            weight = p.weight.float().clone()
        elif isinstance(p, LowRank):
            weight.addmm_(p.a.float().t(), p.b.float().t(), alpha=p.scale)
        elif isinstance(p, RowOverride):
            weight[torch.as_tensor(p.ids, device=weight.device)] = p.rows.float()
        else:
            raise UnsupportedError("merge", f"{type(p).__name__} on {module.path}, an embedding")
    return weight, None


def _merged_norm(
    module: BaseModule, primitives: Sequence[Primitive]
) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight().clone(), module.bias()
    for p in primitives:
        if isinstance(p, ModuleOverride):
            weight, bias = p.weight.float(), p.bias
        elif isinstance(p, BiasDelta) and bias is not None:
            bias = bias + p.b
        else:
            raise UnsupportedError("merge", f"{type(p).__name__} on {module.path}")
    return weight, bias


def _with_weights(module: BaseModule, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of the same kind, quantization and dtype with these weights."""
    original = module.module
    if isinstance(original, QuantLinear):
        return QuantLinear(weight, bias, original.quantization)
    if is_quantized(original):
        return _requantized(original, weight, bias)
    if isinstance(original, Conv1D):
        weight = weight.t()
    made: Any = copy.copy(original)  # shares its buffers and hooks, not its parameters
    made._parameters = dict(original._parameters)
    own = original.weight
    assert isinstance(own, Tensor)
    made.weight = nn.Parameter(weight.to(own.dtype).contiguous(), requires_grad=False)
    made.bias = _parameter(bias, own.dtype)
    if bias is None and "bias" not in original._parameters:
        made._parameters.pop("bias", None)
        del made.bias
    return made


def _parameter(value: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)


def _requantized(original: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A bitsandbytes layer over the codes of `weight`, with the settings of `original`."""
    bnb = bitsandbytes()
    device = original.weight.device
    made: Any
    if isinstance(original, bnb.nn.Linear4bit):
        old: Any = original.weight
        made = bnb.nn.Linear4bit(
            original.in_features,
            original.out_features,
            bias is not None,
            compute_dtype=original.compute_dtype,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            device="meta",
        )
        state = old.quant_state
        dtype = torch.float32 if state is None else state.dtype
        codes: Any = bnb.nn.Params4bit(
            weight.to(dtype).cpu(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=made,
        )
    else:
        assert isinstance(original, bnb.nn.Linear8bitLt)
        made = bnb.nn.Linear8bitLt(
            original.in_features,
            original.out_features,
            bias is not None,
            has_fp16_weights=original.state.has_fp16_weights,
            threshold=original.state.threshold,
            device="meta",
        )
        codes = bnb.nn.Int8Params(
            weight.to(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
        )
    made.weight = codes.to(device)
    if bias is not None:
        own = original.bias
        dtype = torch.float32 if own is None else own.dtype
        made.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    made.train(original.training)
    return made
