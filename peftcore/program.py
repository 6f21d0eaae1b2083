"""Adapter programs: what a trained adapter is to the engine, whatever method made it.

A method is many things while it trains; once trained it is a list of *primitives*, each acting on
one module, one attention layer or the prompt. The engine knows primitives and no methods.

For one token row at a linear module with base map W x + b the primitives compose to

    y = (W (x ⊙ v_in) + b + Σ s · B (A (x ⊙ v_in))) ⊙ v_out + Δb

with the default v_in = v_out = 1, Δb = 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig
from peftcore.errors import CheckpointError, ConfigError, MixtureError


@dataclass(frozen=True, eq=False)
class LowRank:
    """y += scale · B (A x).  a: `[rank, in]`, b: `[out, rank]`."""

    module: str
    a: Tensor
    b: Tensor
    scale: float
    adds: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class InputScale:
    """x ← x ⊙ v.  v: `[in]`."""

    module: str
    v: Tensor
    adds: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class OutputScale:
    """y ← y ⊙ v, the module's bias included.  v: `[out]`.

    A scale that spares the bias (DoRA) is this one beside the BiasDelta b ⊙ (1 − v).
    """

    module: str
    v: Tensor
    adds: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """y += b, after every scale.  b: `[out]`.  Acts on linear and on norm modules."""

    module: str
    b: Tensor
    adds: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """n keys and values before the sequence's own, as they lie in the cache (keys already rotated).

    keys: `[n, num_kv_heads, head_dim]`, values: `[n, num_kv_heads, v_head_dim]`.
    """

    layer: int
    keys: Tensor
    values: Tensor
    adds: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """n rows of the embedding's output before the prompt.  rows: `[n, hidden]`."""

    rows: Tensor
    adds: ClassVar[bool] = False


Primitive = LowRank | InputScale | OutputScale | BiasDelta | PrefixKV | VirtualTokens


def tensors_of(primitive: Primitive) -> tuple[Tensor, ...]:
    """The tensors that a primitive holds, in the order in which an arena stores them."""
    match primitive:
        case LowRank(a=a, b=b):
            return a, b
        case InputScale(v=v) | OutputScale(v=v):
            return (v,)
        case BiasDelta(b=b):
            return (b,)
        case PrefixKV(keys=keys, values=values):
            return keys, values
        case VirtualTokens(rows=rows):
            return (rows,)


@dataclass(frozen=True, eq=False)
class AdapterProgram:
    """A compiled adapter: its identity and its primitives, tensors in float32 on the CPU.

    Attributes:
        digest: SHA-256 of the canonical config and weights as hex; the adapter's identity.
        method: PEFT's `peft_type`.
        num_virtual_tokens: positions that the adapter takes before the prompt.
    """

    digest: str
    method: str
    primitives: Sequence[Primitive]
    num_virtual_tokens: int = 0

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


def digest_of(config: AdapterConfig, tensors: TensorReader) -> str:
    """SHA-256 over the canonical config and every tensor's name, dtype, shape and bytes, as hex."""
    digest = hashlib.sha256()
    canonical = {"peft_type": config.peft_type, **config.canonical()}
    digest.update(json.dumps(canonical).encode())
    for key in sorted(tensors.keys()):
        tensor = tensors.peek(key)
        digest.update(f"\0{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compile_adapter(
    config: AdapterConfig, tensors: TensorReader, base: BaseModel, *, digest: str | None = None
) -> AdapterProgram:
    """Check an adapter against the base and turn it into a program.

    Args:
        config: the parsed config.
        tensors: the weights; afterwards every key has been taken.
        base: the model to attach to.
        digest: the adapter's digest where it is known already.

    Raises:
        ConfigError: the config does not fit the base.
        CheckpointError: a key is missing, left over, misshapen or not finite.
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(
            "task_type", f"{config.task_type}: this server serves CAUSAL_LM adapters only"
        )
    primitives = config.compile(base, tensors)
    tensors.finish()
    for primitive in primitives:
        for tensor in tensors_of(primitive):
            if not bool(torch.isfinite(tensor).all()):
                where = getattr(primitive, "module", type(primitive).__name__)
                raise CheckpointError(where, "the compiled values are not finite")
    virtual = next(
        (p.rows.shape[0] for p in primitives if isinstance(p, VirtualTokens)),
        next((p.keys.shape[0] for p in primitives if isinstance(p, PrefixKV)), 0),
    )
    return AdapterProgram(
        digest or digest_of(config, tensors), config.peft_type, primitives, virtual
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
