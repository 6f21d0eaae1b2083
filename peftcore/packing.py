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
    with_tensors,
)
from peftcore.program import AdapterProgram

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

    low_rank: Aᵀ `[in, rank]`, Bᵀ `[rank, out]` and the factor; scales and bias `[in]` or `[out]`;
    rotation `[num_blocks, b, b]`; override: the weight and the bias or None, as `ModuleOverride`
    has them; rows: ids `[k]` int64, not in the arena, and the rows `[k, dim]`; bottleneck: itself,
    its tensors being views; is_stream: a bottleneck at another module reads what this one is given.
    """

    low_rank: tuple[Tensor, Tensor, float] | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None
    rotation: Tensor | None = None
    override: tuple[Tensor, Tensor | None] | None = None
    rows: tuple[Tensor, Tensor] | None = None
    bottleneck: Bottleneck | None = None
    is_stream: bool = False


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


@torch.no_grad()
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
        shapes = [torch.empty_like(t, device="meta") for t in tensors_of(primitive)]
        layout.append((with_tensors(primitive, shapes), tuple(offsets)))
    return PackedAdapter(program.digest, data, layout)


def bind(digest: str, layout: Layout, buffer: Tensor, offset: int) -> BoundAdapter:
    """The views of an adapter that lies in `buffer` at `offset`."""
    bound = BoundAdapter(digest)
    for primitive, offsets in layout:
        views = [
            buffer[offset + o : offset + o + t.numel()].view(t.shape)
            for t, o in zip(tensors_of(primitive), offsets, strict=True)
        ]
        match with_tensors(primitive, views):
            case PrefixKV(layer=layer, keys=keys, values=values):
                bound.prefix[layer] = (keys, values)
            case VirtualTokens(rows=rows):
                bound.virtual_tokens = rows
            case at_module:
                weights = bound.modules.setdefault(at_module.module, ModuleWeights())
                _add(weights, at_module, buffer.device)
                if isinstance(at_module, Bottleneck) and at_module.stream is not None:
                    bound.modules.setdefault(at_module.stream, ModuleWeights()).is_stream = True
    return bound


def _add(weights: ModuleWeights, primitive: ModulePrimitive, device: torch.device) -> None:
    match primitive:
        case LowRank(a=a, b=b, scale=scale):
            weights.low_rank = (a.t(), b.t(), scale)
        case InputRotation(blocks=blocks):
            weights.rotation = blocks
        case InputScale(v=v):
            weights.input_scale = v
        case OutputScale(v=v):
            weights.output_scale = v
        case BiasDelta(b=b):
            weights.bias = b
        case ModuleOverride(weight=weight, bias=bias):
            weights.override = (weight, bias)
        case RowOverride(ids=ids, rows=rows):
            weights.rows = (torch.tensor(ids, device=device), rows)
        case Bottleneck():
            weights.bottleneck = primitive


__all__ = [
    "BoundAdapter",
    "ModuleWeights",
    "PackedAdapter",
    "bind",
    "pack",
    "packed_elements",
]
