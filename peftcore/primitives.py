"""Serving primitives: what a trained adapter does at one module, one layer, or before the prompt.

For one token row x at a linear module with base map W x + b the primitives compose, in this order:

    x ← (x R) ⊙ v_in                    InputRotation, InputScale
    y = W x + b                         or ModuleOverride's W and b
    y ← (y + Σ s · B (A x)) ⊙ v_out     LowRank, OutputScale
    y ← y + Δb                          BiasDelta
    y_i ← w_i · x + b_i for i in ids    RowOverride
    y ← bottleneck(y, r)                Bottleneck, where y is a branch of a layer

and what is not there does nothing. An embedding is the map of one-hot rows: y is the base's or the
override's row, LowRank is added, and last RowOverride replaces. A norm knows ModuleOverride and
then BiasDelta. An adapter has at most one primitive of a kind at a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """y += scale · B (A x).  a: `[rank, in]`, b: `[out, rank]`.

    At an embedding a is `[rank, num_embeddings]` and b `[dim, rank]`: token t's row gets
    scale · B A[:, t], times what the module scales its rows with.
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float
    adds: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class InputRotation:
    """x ← x R, R block-diagonal.  blocks: `[num_blocks, b, b]` with num_blocks · b = in.

    Row-vector convention: x's n-th piece of b values is multiplied from the right by blocks[n].
    Comes before the InputScale; the map and LowRank see the rotated x.
    """

    module: str
    blocks: Tensor
    adds: ClassVar[bool] = False


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
class ModuleOverride:
    """The module's own map with other parameters, whatever it is and however it is quantized.

    weight: linear `[out, in]` (a Conv1D's too), embedding `[num_embeddings, dim]`, norm `[dim]` as
    the module itself stores it (Gemma's norm adds 1). bias: `[out]`; None: the map has no bias, not
    even the base's.
    """

    module: str
    weight: Tensor
    bias: Tensor | None
    adds: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class RowOverride:
    """Some rows of the module's weight are others.  rows: `[len(ids), dim]`; ids: distinct.

    At an embedding: tokens in ids get the new rows, times what the module scales its rows with. At
    a linear module: outputs in ids are x @ rowsᵀ and the base's bias there; they are final, so
    that no other primitive of the adapter acts on them but through x. `ids` are integers that no
    arena could hold: they stay in the layout.
    """

    module: str
    ids: tuple[int, ...]
    rows: Tensor
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assert isinstance(self.ids, tuple), "a tensor would be packed into the arena"


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


#: A row of a branch of a layer: what it gives, the stream that it is added to, their sum, and the
#: sum after the layer's own norm (where the norm comes after the branch).
BranchValue = Literal["branch", "stream", "sum", "normed"]


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A small network on a branch of a layer. `ops.bottleneck` says what it computes.

    down: `[k, d]`, down_bias: `[k]`, up: `[d, k]`, up_bias: `[d]`, norm_weight and norm_bias: `[d]`
    or None. Factors, and the weights of a norm before `down`, are in these already.

    Attributes:
        module: the `path` of a `branches.Branch`.
        stream: path of the norm whose input is the residual stream; None where the module is given
            the stream itself, or where nothing reads it.
        activation: AdapterHub's name of it.
        reads: what `down` reads.
        keeps: what is added to what `up` gives.
        closes: does the model's own sum (and norm) follow? Else this is the layer's result.
        normalizes: is what is read normalized before?
        keeps_in_norm: is `keeps` added before the norm of norm_weight, rather than after?
    """

    module: str
    stream: str | None
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    reads: BranchValue
    keeps: BranchValue
    closes: bool = True
    normalizes: bool = False
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    keeps_in_norm: bool = False
    adds: ClassVar[bool] = False

    @property
    def needs_stream(self) -> bool:
        return not self.closes or {self.reads, self.keeps} != {"branch"}


#: What acts on one module, named by its path.
ModulePrimitive = (
    LowRank
    | InputRotation
    | InputScale
    | OutputScale
    | BiasDelta
    | ModuleOverride
    | RowOverride
    | Bottleneck
)
Primitive = ModulePrimitive | PrefixKV | VirtualTokens

P = TypeVar("P", bound=Primitive)


def _tensor_fields(primitive: Primitive) -> list[str]:
    fields = dataclasses.fields(primitive)
    return [f.name for f in fields if isinstance(getattr(primitive, f.name), Tensor)]


def tensors_of(primitive: Primitive) -> tuple[Tensor, ...]:
    """The tensors that a primitive holds, in the order in which an arena stores them."""
    return tuple(getattr(primitive, name) for name in _tensor_fields(primitive))


def with_tensors(primitive: P, tensors: Sequence[Tensor]) -> P:
    """The primitive with other tensors in the place of its `tensors_of`."""
    changes: dict[str, Any] = dict(zip(_tensor_fields(primitive), tensors, strict=True))
    return dataclasses.replace(primitive, **changes)


#: What a module is to primitives.
