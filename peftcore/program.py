"""Adapter programs: what a trained adapter is to the engine, whatever method made it.

A method is many things while it trains; once trained it is a list of primitives, and an identity.
The engine knows primitives and no methods.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from peftcore.base import BaseModel, BaseModule
from peftcore.branches import branches_of
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig
from peftcore.errors import CheckpointError, ConfigError, MixtureError
from peftcore.primitives import (
    BiasDelta,
    Bottleneck,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    ModulePrimitive,
    OutputScale,
    PrefixKV,
    Primitive,
    RowOverride,
    VirtualTokens,
    tensors_of,
)

Surface = Literal["linear", "embedding", "norm"]


def surface_of(module: BaseModule) -> Surface | None:
    """What primitives may take `module` for; None for one that none acts on.

    A norm is a module without children whose weight is one vector. Embeddings and norms compute
    from one tensor alone, so that a segment's rows can be given to them.
    """
    if module.is_linear:
        return "linear"
    if len(inspect.signature(type(module.module).forward).parameters) != 2:  # self and a tensor
        return None
    if module.kind == "embedding":
        return "embedding"
    weight = dict(module.module.named_parameters(recurse=False)).get("weight")
    is_leaf = next(module.module.children(), None) is None
    return "norm" if is_leaf and weight is not None and weight.dim() == 1 else None


def check_fits(primitives: Sequence[Primitive], base: BaseModel) -> None:
    """Refuse what would act on nothing, or not fit where it acts: a step must never fail by it.

    Raises:
        ConfigError: names the module.
    """
    seen = set()
    for p in primitives:
        if isinstance(p, PrefixKV | VirtualTokens):
            continue
        kind, module = type(p).__name__, base.modules.get(p.module)
        if module is None:
            raise ConfigError(p.module, f"{kind}: the base model has no such module")
        if not (_fits_branch(p, base) if isinstance(p, Bottleneck) else _fits(p, module)):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(p))
            raise ConfigError(
                p.module,
                f"{kind} with shapes {shapes} is not served on {type(module.module).__name__}",
            )
        seen.add((p.module, type(p)))
    if len(seen) < sum(not isinstance(p, PrefixKV | VirtualTokens) for p in primitives):
        raise ConfigError("target_modules", "two primitives of one kind act on one module")


def _fits_branch(p: Bottleneck, base: BaseModel) -> bool:
    branch = next((b for b in branches_of(base) if b.path == p.module), None)
    if branch is None:
        return False
    k, d = len(p.down), base.hidden_size
    norms = [t for t in (p.norm_weight, p.norm_bias) if t is not None]
    shapes = [(p.down, (k, d)), (p.down_bias, (k,)), (p.up, (d, k)), (p.up_bias, (d,))]
    pre_norm = branch.stream is not None
    return (
        all(tensor.shape == shape for tensor, shape in shapes)
        and all(tensor.shape == (d,) for tensor in norms)
        and p.stream == (branch.stream if p.needs_stream else None)
        and not (pre_norm and "normed" in (p.reads, p.keeps))
    )


def _fits(primitive: ModulePrimitive, module: BaseModule) -> bool:
    surface = surface_of(module)
    if surface is None:
        return False
    n_in, n_out = module.in_features, module.out_features
    if surface == "embedding":
        n_in, n_out = module.module.weight.shape  # type: ignore[misc]
    elif surface == "norm":
        (n_out,) = module.module.weight.shape  # type: ignore[misc]
    match primitive:
        case LowRank(a=a, b=b):
            rank = primitive.rank
            return surface != "norm" and a.shape == (rank, n_in) and b.shape == (n_out, rank)
        case InputRotation(blocks=blocks):
            num_blocks, size, _ = blocks.shape
            return surface == "linear" and blocks.shape[2] == size and num_blocks * size == n_in
        case InputScale(v=v):
            return surface == "linear" and v.shape == (n_in,)
        case OutputScale(v=v):
            return surface == "linear" and v.shape == (n_out,)
        case BiasDelta(b=b):
            return surface != "embedding" and b.shape == (n_out,)
        case ModuleOverride(weight=weight, bias=bias):
            shapes = {"linear": (n_out, n_in), "embedding": (n_in, n_out), "norm": (n_out,)}
            has_bias = surface == "linear" or (surface == "norm" and module.bias() is not None)
            return weight.shape == shapes[surface] and (
                bias is None or (has_bias and bias.shape == (n_out,))
            )
        case RowOverride(ids=ids, rows=rows):
            num, dim = (n_in, n_out) if surface == "embedding" else (n_out, n_in)
            distinct = len(set(ids)) == len(ids) > 0
            in_range = all(0 <= i < num for i in ids)
            return surface != "norm" and distinct and in_range and rows.shape == (len(ids), dim)
        case Bottleneck():
            raise AssertionError("a bottleneck is fitted to a branch")


@dataclass(frozen=True, eq=False)
class AdapterProgram:
    """A compiled adapter: its identity and its primitives, tensors in float32 on the CPU.

    Attributes:
        digest: SHA-256 of the canonical config and weights as hex; the adapter's identity.
        method: PEFT's `peft_type`.
        num_virtual_tokens: positions that the adapter takes before the prompt.
        task: PEFT's `task_type`; None for one that generates.
        num_labels: of the adapter's own head; 0 without one.
    """

    digest: str
    method: str
    primitives: Sequence[Primitive]
    num_virtual_tokens: int = 0
    task: str | None = None
    num_labels: int = 0

    @property
    def max_rank(self) -> int:
        """Largest rank of a low-rank part; 0 without one."""
        return max((p.rank for p in self.primitives if isinstance(p, LowRank)), default=0)

    @property
    def num_elements(self) -> int:
        return sum(t.numel() for p in self.primitives for t in tensors_of(p))

    @property
    def adds(self) -> bool:
        """Can this adapter be one of several in a mixture?"""
        return all(p.adds for p in self.primitives)

    @property
    def virtual_kv(self) -> bool:
        """Are the virtual positions' keys and values given, rather than computed?"""
        return any(isinstance(p, PrefixKV) for p in self.primitives)

    @property
    def modules(self) -> list[str]:
        """The module paths that the program acts on, in order, once each."""
        return list(
            dict.fromkeys(
                p.module for p in self.primitives if not isinstance(p, PrefixKV | VirtualTokens)
            )
        )


def digest_of(config: AdapterConfig, tensors: TensorReader, task: str | None = None) -> str:
    """SHA-256 over the canonical config and every tensor's name, dtype, shape and bytes, as hex.

    A task decides what a head means: it counts, where there is one.
    """
    digest = hashlib.sha256()
    canonical = {"peft_type": config.peft_type, **config.canonical()}
    if task is not None:
        canonical["task_type"] = task
    digest.update(json.dumps(canonical).encode())
    for key in sorted(tensors.keys()):
        tensor = tensors.peek(key)
        digest.update(f"\0{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compile_adapter(
    config: AdapterConfig,
    tensors: TensorReader,
    base: BaseModel,
    *,
    digest: str | None = None,
    check_values: bool = True,
    task: str | None = None,
) -> AdapterProgram:
    """Check an adapter against the base and turn it into a program.

    Args:
        config: the parsed config.
        tensors: the weights; afterwards every key has been taken.
        base: the model to attach to.
        digest: the adapter's digest where it is known already.
        check_values: must what it compiles to be finite? It was looked at before, if not.
        task: what `base` is a view for, see `tasks`; None: it generates.

    Raises:
        ConfigError: the config, or what it compiles to, does not fit the base.
        CheckpointError: a key is missing, left over, misshapen or not finite.
    """
    if task is None and config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError("task_type", f"{config.task_type}: this base serves CAUSAL_LM only")
    primitives = config.compile(base, tensors)
    tensors.finish()
    check_fits(primitives, base)
    for primitive in primitives if check_values else ():
        for tensor in tensors_of(primitive):
            if not bool(torch.isfinite(tensor).all()):
                where = getattr(primitive, "module", type(primitive).__name__)
                raise CheckpointError(where, "the compiled values are not finite")
    virtual = next(
        (p.rows.shape[0] for p in primitives if isinstance(p, VirtualTokens)),
        next((p.keys.shape[0] for p in primitives if isinstance(p, PrefixKV)), 0),
    )
    return AdapterProgram(
        digest or digest_of(config, tensors, task), config.peft_type, primitives, virtual, task
    )


#: Largest weight of an adapter in a mixture: no factor made of it overflows.
MAX_WEIGHT = 1e3


def check_mixture(adds: Sequence[tuple[str, bool, str]], weights: Sequence[float]) -> None:
    """Refuse a mixture that has no exact sum, or not a finite one.

    Args:
        adds: per adapter its name, `AdapterProgram.adds` and its method.
        weights: per adapter its weight.

    Raises:
        MixtureError: one does not add, and is not alone with weight 1; or a weight is too large.
    """
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise MixtureError(f"adapters: weight {weight} is not within ±{MAX_WEIGHT:g}")
    if len(adds) == 1 and weights[0] == 1.0:
        return
    for name, adds_up, method in adds:
        if not adds_up:
            raise MixtureError(
                f"adapters: {name!r} ({method}) cannot be weighted or mixed, because its parts do "
                "not add up; only adapters made of low-rank updates and biases can. "
                "Name it alone with weight 1"
            )
