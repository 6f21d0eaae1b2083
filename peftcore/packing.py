"""An adapter as one buffer: packed on the host, bound where it lies in an arena.

`pack` lays a program's tensors one after another in one contiguous tensor, so that loading is one
copy; `bind` gives the views that the layers multiply with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftcore.arena import aligned
from peftcore.program import (
    AdapterProgram,
    BiasDelta,
    InputScale,
    LowRank,
    OutputScale,
    PrefixKV,
    Primitive,
    VirtualTokens,
    tensors_of,
)

#: Per primitive: the primitive with its tensors on the meta device, and their offsets in elements.
Layout = Sequence[tuple[Primitive, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """A program's tensors in one buffer `[num_elements]`, each at an aligned offset."""

    digest: str
    data: Tensor
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(eq=False)
class ModuleWeights:
    """What one adapter does at one module; views into the arena.

    low_rank: Aᵀ `[in, rank]`, Bᵀ `[rank, out]` and the factor; scales and bias `[in]` or `[out]`.
    """

    low_rank: tuple[Tensor, Tensor, float] | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(eq=False)
class BoundAdapter:
    """A resident adapter.

    Attributes:
        modules: module path → what it does there.
        prefix: layer → keys `[n, kv_heads, head_dim]` and values.
        virtual_tokens: `[n, hidden]`, or None.
    """

    digest: str
    modules: dict[str, ModuleWeights] = field(default_factory=dict)
    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    virtual_tokens: Tensor | None = None


def packed_elements(program: AdapterProgram) -> int:
    """The number of elements that `pack` makes of the program."""
    return sum(aligned(t.numel()) for p in program.primitives for t in tensors_of(p))


def pack(program: AdapterProgram, dtype: torch.dtype, *, pin_memory: bool = False) -> PackedAdapter:
    """Lay the program out in one host buffer of `dtype`."""
    data = torch.zeros(packed_elements(program), dtype=dtype, pin_memory=pin_memory)
    layout = []
    end = 0
    for primitive in program.primitives:
        offsets = []
        for tensor in tensors_of(primitive):
            data[end : end + tensor.numel()] = tensor.flatten()
            offsets.append(end)
            end += aligned(tensor.numel())
        layout.append((_shape_only(primitive), tuple(offsets)))
    return PackedAdapter(program.digest, data, layout)


def _shape_only(primitive: Primitive) -> Primitive:
    def meta(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta")

    match primitive:
        case LowRank(module=m, a=a, b=b, scale=s):
            return LowRank(m, meta(a), meta(b), s)
        case InputScale(module=m, v=v):
            return InputScale(m, meta(v))
        case OutputScale(module=m, v=v):
            return OutputScale(m, meta(v))
        case BiasDelta(module=m, b=b):
            return BiasDelta(m, meta(b))
        case PrefixKV(layer=i, keys=k, values=v):
            return PrefixKV(i, meta(k), meta(v))
        case VirtualTokens(rows=rows):
            return VirtualTokens(meta(rows))


def bind(digest: str, layout: Layout, buffer: Tensor, offset: int) -> BoundAdapter:
    """The views of an adapter that lies in `buffer` at `offset`."""
    bound = BoundAdapter(digest)

    def views(primitive: Primitive, offsets: tuple[int, ...]) -> list[Tensor]:
        return [
            buffer[offset + o : offset + o + t.numel()].view(t.shape)
            for t, o in zip(tensors_of(primitive), offsets, strict=True)
        ]

    for primitive, offsets in layout:
        tensors = views(primitive, offsets)
        match primitive:
            case PrefixKV(layer=layer):
                bound.prefix[layer] = (tensors[0], tensors[1])
                continue
            case VirtualTokens():
                bound.virtual_tokens = tensors[0]
                continue
        weights = bound.modules.setdefault(primitive.module, ModuleWeights())
        match primitive:
            case LowRank(scale=scale):
                weights.low_rank = (tensors[0].t(), tensors[1].t(), scale)
            case InputScale():
                weights.input_scale = tensors[0]
            case OutputScale():
                weights.output_scale = tensors[0]
            case BiasDelta():
                weights.bias = tensors[0]
    return bound


__all__ = [
    "BoundAdapter",
    "ModuleWeights",
    "PackedAdapter",
    "bind",
    "pack",
    "packed_elements",
]
