"""An adapter as one buffer: packed on the host, bound where it lies in an arena.

`pack` lays a program's tensors one after another in one buffer of bytes, so that loading is one
copy; `bind` gives the views that the layers multiply with. `save_packed` keeps that buffer in a
file, for compiling takes many times as long as the copy. A low-rank update's factors are kept in
half precision where that changes none of their values, as when they were saved so, or rounded to
int8: decoding with many adapters is bound by the bytes of their factors.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftcore.arena import aligned
from peftcore.ops import select
from peftcore.ops.segments import module_id
from peftcore.ops.tiles import TILE, num_tiles, tiled, untiled
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
from peftcore.quant.packed import pack_int8, unpack_int8
from peftcore.upload import upload


class Place(NamedTuple):
    """Where one tensor lies: bytes from the adapter's start, its shape and dtype."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


#: Per primitive: the primitive with its tensors on the meta device, and their places.
Layout = Sequence[tuple[Primitive, tuple[Place, ...]]]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """A program's tensors in one buffer `[num_bytes]` uint8, each at an aligned place."""

    digest: str
    data: Tensor
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    def pinned(self) -> PackedAdapter:
        """The same in pinned memory, from which a GPU copies while it computes."""
        return dataclasses.replace(self, data=self.data.pin_memory())


class LowRankFactors(NamedTuple):
    """scale · B A.  a: `[rank, in]`; b_tiles: B in tiles of outputs, `[tiles, rank, 16]`.

    Rounded, both are int8 as `pack_int8` has them, of a rank filled up to fours, and scales
    `[rank tiles, 16]` float32 are what the products of both have to be multiplied with.
    """

    a: Tensor
    b_tiles: Tensor
    in_: int
    out: int
    scale: float
    scales: Tensor | None = None

    @property
    def a_t(self) -> Tensor:
        """Aᵀ `[in, rank]`; rounded, without the scales."""
        if self.scales is None:
            return self.a.t()
        return unpack_int8(self.a, 4 * self.b_tiles.shape[1], self.in_).t()

    @property
    def b_t(self) -> Tensor:
        """Bᵀ `[rank, out]`, times the scales, in fresh memory."""
        if self.scales is None:
            return untiled(self.b_tiles, self.out).t()
        b_t = unpack_int8(self.b_tiles, self.out, 4 * self.b_tiles.shape[1]).t()
        return b_t * self.scales.view(-1, 1)[: len(b_t)]


@dataclass(eq=False)
class ModuleWeights:
    """What one adapter does at one module; views into the arena.

    Scales and bias `[in]` or `[out]`; rotation `[num_blocks, b, b]`; override: the weight and the
    bias or None, as `ModuleOverride` has them; rows: ids `[k]` int64, not in the arena, and the
    rows `[k, dim]`; bottleneck: itself, its tensors being views; is_stream: a bottleneck at another
    module reads what this one is given.
    """

    low_rank: LowRankFactors | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None
    rotation: Tensor | None = None
    override: tuple[Tensor, Tensor | None] | None = None
    rows: tuple[Tensor, Tensor] | None = None
    bottleneck: Bottleneck | None = None
    is_stream: bool = False

    @property
    def is_simple(self) -> bool:
        """Nothing but a low-rank update, scales and a bias?"""
        others = (self.rotation, self.override, self.rows, self.bottleneck)
        return not self.is_stream and all(other is None for other in others)


@dataclass(eq=False)
class BoundAdapter:
    """A resident adapter.

    Attributes:
        modules: module path → what it does there, but for what `kernel` does.
        kernel: the kernels' adapter: low-rank updates, scales and biases at linear modules.
        prefix: layer → keys `[n, kv_heads, head_dim]` and values.
        virtual_tokens: `[n, hidden]`, or None.
    """

    digest: str
    modules: dict[str, ModuleWeights] = field(default_factory=dict)
    kernel: Any = None
    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    virtual_tokens: Tensor | None = None


class PackedSize(NamedTuple):
    """How large a program is when it is packed.

    Attributes:
        num_elements: of all tensors.
        num_half_elements: those of them that are kept in half precision.
        num_rounded_bytes: of the program packed with rounded factors.
    """

    num_elements: int
    num_half_elements: int
    num_rounded_bytes: int

    def num_bytes(self, dtype: torch.dtype) -> int:
        """What `pack` makes of it."""
        if dtype == torch.int8:
            return self.num_rounded_bytes
        others = self.num_elements - self.num_half_elements
        return self.num_half_elements * 2 + others * dtype.itemsize


@torch.no_grad()
def packed_size(program: AdapterProgram) -> PackedSize:
    total = half = rounded = 0
    for primitive in program.primitives:
        kept = _half_dtype(primitive)
        count = sum(aligned(t.numel()) for t in _stored(primitive))
        total += count
        half += count if kept is not None else 0
        if _is_rounded(primitive):
            rounded += _rounded_bytes(primitive)
        else:
            rounded += count * (kept or torch.float32).itemsize
    return PackedSize(total, half, rounded)


@torch.no_grad()
def pack(program: AdapterProgram, dtype: torch.dtype) -> PackedAdapter:
    """Lay the program out in one host buffer.

    Args:
        dtype: of what half precision would change; int8: low-rank updates' factors are rounded, and
            the rest is in float32.
    """
    layout = []
    contents: list[tuple[Place, Tensor]] = []
    end = 0
    for primitive in program.primitives:
        places = []
        if dtype == torch.int8 and _is_rounded(primitive):
            stored = [(tensor, tensor.dtype) for tensor in round_factors(primitive.a, primitive.b)]
        else:
            others = torch.float32 if dtype == torch.int8 else dtype
            kept = _half_dtype(primitive) or others
            stored = [(tensor, kept) for tensor in _stored(primitive)]
        for tensor, kept in stored:
            place = Place(end, tensor.shape, kept)
            places.append(place)
            contents.append((place, tensor))
            end += aligned(tensor.numel()) * kept.itemsize
        shapes = [torch.empty_like(t, device="meta") for t in tensors_of(primitive)]
        layout.append((with_tensors(primitive, shapes), tuple(places)))
    data = torch.zeros(end, dtype=torch.uint8)
    for place, tensor in contents:
        _view(data, 0, place).copy_(tensor)
    return PackedAdapter(program.digest, data, layout)


#: Of `save_packed`'s files: changes with what `pack` makes of a program.
_VERSION = "1"
_KINDS: dict[str, type[Primitive]] = {
    kind.__name__: kind for kind in (*get_args(ModulePrimitive), PrefixKV, VirtualTokens)
}
_DTYPES = {
    str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8)
}


def save_packed(packed: PackedAdapter, made_for: str, path: Path) -> None:
    """Write it to a file from which loading is one copy.

    Args:
        made_for: what it depends on beside the adapter: the base's values, the dtype.
    """
    places = [
        [type(primitive).__name__, _fields_to_json(primitive), [_place_to_json(p) for p in places]]
        for primitive, places in packed.layout
    ]
    metadata = _identity(packed.digest, made_for) | {"layout": json.dumps(places)}
    save_file({"data": packed.data}, path, metadata)


def read_packed(path: Path, digest: str, made_for: str) -> PackedAdapter | None:
    """What `save_packed` wrote of this adapter; None where that is not there, not to be read, or
    made for something else.

    The data are mapped, and the system is asked to read them at once rather than page by page.
    """
    try:
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as whole:
                os.posix_fadvise(whole.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if not _identity(digest, made_for).items() <= metadata.items():
                return None
            layout = _layout_from_json(metadata["layout"])
            data = file.get_tensor("data")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    ends = [p.offset + p.shape.numel() * p.dtype.itemsize for _, places in layout for p in places]
    return PackedAdapter(digest, data, layout) if max(ends, default=0) <= len(data) else None


def _identity(digest: str, made_for: str) -> dict[str, str]:
    return {"version": _VERSION, "digest": digest, "made_for": made_for}


def _fields_to_json(primitive: Primitive) -> dict[str, Any]:
    values = {f.name: getattr(primitive, f.name) for f in dataclasses.fields(primitive)}
    return {k: {"shape": v.shape} if isinstance(v, Tensor) else v for k, v in values.items()}


def _fields_from_json(kind: str, fields: dict[str, Any]) -> Primitive:
    def value(given: Any) -> Any:
        if isinstance(given, dict):
            return torch.empty(given["shape"], device="meta")
        return tuple(given) if isinstance(given, list) else given

    return _KINDS[kind](**{name: value(given) for name, given in fields.items()})


@lru_cache(maxsize=32)
def _layout_from_json(text: str) -> Layout:
    """Adapters of one method, rank and targets have one layout, and it is no small text."""
    return tuple(
        (_fields_from_json(kind, fields), tuple(map(_place_from_json, places)))
        for kind, fields, places in json.loads(text)
    )


def _place_to_json(place: Place) -> list[Any]:
    return [place.offset, list(place.shape), str(place.dtype)]


def _place_from_json(place: list[Any]) -> Place:
    offset, shape, dtype = place
    return Place(offset, torch.Size(shape), _DTYPES[dtype])


def _stored(primitive: Primitive) -> tuple[Tensor, ...]:
    """The primitive's tensors in the form in which they lie in memory."""
    if isinstance(primitive, LowRank):
        return primitive.a, tiled(primitive.b)
    return tensors_of(primitive)


#: Of a lower rank A's codes, in tiles of sixteen, would be no smaller than its halves.
FEWEST_ROUNDED = TILE // 2


def _is_rounded(primitive: Primitive) -> TypeGuard[LowRank]:
    return isinstance(primitive, LowRank) and primitive.rank >= FEWEST_ROUNDED


def round_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors to the nearest of 255 multiples of a step, one for each rank, as they lie in
    memory: a, b_tiles and scales of `LowRankFactors`.

    Args:
        a: `[rank, in]`.
        b: `[out, rank]`.
    """

    def codes(x: Tensor, largest: Tensor) -> Tensor:
        of_zeros = largest == 0
        return (x * (127 / largest.masked_fill(of_zeros, 1))).round_().to(torch.int8)

    a, b = a.float(), b.float()
    a_largest, b_largest = a.abs().amax(1), b.abs().amax(0)
    a_packed, scales = pack_int8(codes(a, a_largest[:, None]), a_largest * b_largest / 127)
    b_packed, _ = pack_int8(codes(b, b_largest), b_largest.new_ones(len(b)))
    return a_packed, b_packed, scales


def _rounded_bytes(primitive: LowRank) -> int:
    """Of what `round_factors` gives, each aligned."""
    (rank, in_), out = primitive.a.shape, len(primitive.b)
    quad = 4 * TILE
    a, b = num_tiles(rank) * -(-in_ // 4) * quad, num_tiles(out) * -(-rank // 4) * quad
    scales = num_tiles(rank) * TILE
    return aligned(a) + aligned(b) + aligned(scales) * torch.float32.itemsize


def _half_dtype(primitive: Primitive) -> torch.dtype | None:
    """The half precision that holds a low-rank update's factors exactly, if one does."""
    if isinstance(primitive, LowRank):
        for dtype in (torch.float16, torch.bfloat16):
            if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors_of(primitive)):
                return dtype
    return None


def _view(buffer: Tensor, offset: int, place: Place) -> Tensor:
    """A place of an adapter that lies in `buffer` at `offset`. One operation in the place of three:
    an adapter has hundreds, and the engine waits for them."""
    typed = buffer.view(place.dtype)
    start = typed.storage_offset() + (offset + place.offset) // place.dtype.itemsize
    return typed.as_strided(place.shape, _strides(place.shape), start)


@lru_cache(maxsize=256)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def bind(
    digest: str,
    layout: Layout,
    buffer: Tensor,
    offset: int,
    linears: Mapping[str, tuple[int, int]] | None = None,
) -> BoundAdapter:
    """The views of an adapter that lies in `buffer`, uint8, at `offset`.

    Args:
        linears: path → (in, out) of the modules at which kernels act; None for nowhere.
    """
    bound = BoundAdapter(digest)
    adapter = None
    if linears is not None:
        ops = select(buffer.device)
        assert ops is not None, "linears are named where there are kernels"
        adapter = ops.Adapter()
        layout = _give_updates(adapter, layout, buffer, offset, linears)
    for primitive, places in layout:
        views = [_view(buffer, offset, place) for place in places]
        match primitive:
            case PrefixKV(layer=layer):
                bound.prefix[layer] = (views[0], views[1])
            case VirtualTokens():
                bound.virtual_tokens = views[0]
            case LowRank(module=module, scale=scale, a=a, b=b):
                weights = bound.modules.setdefault(module, ModuleWeights())
                a_view, b_view, *scales = views
                weights.low_rank = LowRankFactors(
                    a_view, b_view, a.shape[1], len(b), scale, *scales
                )
            case at_module:
                at_module = with_tensors(at_module, views)
                weights = bound.modules.setdefault(at_module.module, ModuleWeights())
                _add(weights, at_module, buffer.device)
                if isinstance(at_module, Bottleneck) and at_module.stream is not None:
                    bound.modules.setdefault(at_module.stream, ModuleWeights()).is_stream = True
    if adapter is not None and linears is not None:
        _give_to_kernels(bound, adapter, linears)
    return bound


def _give_updates(
    adapter: Any,
    layout: Layout,
    buffer: Tensor,
    offset: int,
    linears: Mapping[str, tuple[int, int]],
) -> Layout:
    """Give the kernels' `adapter` the low-rank updates beside which nothing is done at a linear
    module, which most adapters consist of, and return the rest. No view is made of them: an adapter
    has hundreds, and the engine waits while it is bound.
    """
    acting = Counter(getattr(primitive, "module", None) for primitive, _ in layout)
    acting.update(getattr(primitive, "stream", None) for primitive, _ in layout)
    updates, rest = [], []
    for primitive, places in layout:
        size = linears.get(primitive.module) if isinstance(primitive, LowRank) else None
        if size is None or not isinstance(primitive, LowRank) or acting[primitive.module] > 1:
            rest.append((primitive, places))
            continue
        (rank, in_), out = primitive.a.shape, primitive.b.shape[0]
        if (in_, out) != size:
            raise ValueError(
                f"{primitive.module}: an update of [{out}, {in_}] at one of [{size[1]}, {size[0]}]"
            )
        a, b, scales = (*(offset + place.offset for place in places), -1)[:3]
        of = (module_id(primitive.module), in_, out, rank, places[0].dtype, primitive.scale)
        updates.append((*of, a, b, scales))
    adapter.set_low_rank(buffer, updates)
    return rest


def _give_to_kernels(
    bound: BoundAdapter, adapter: Any, linears: Mapping[str, tuple[int, int]]
) -> None:
    """Move what the kernels do from `modules` to `kernel`, which is `adapter`."""
    for path in [path for path in bound.modules if path in linears]:
        weights = bound.modules[path]
        if not weights.is_simple:
            continue
        update: dict[str, Any] = {}
        if weights.low_rank is not None:
            a, b, _, _, scale, scales = weights.low_rank
            update = {"a": a, "b": b, "scale": scale}
            update |= {} if scales is None else {"scales": scales}
        adapter.set(
            module_id(path),
            *linears[path],
            **update,
            in_scale=weights.input_scale,
            out_scale=weights.output_scale,
            bias=weights.bias,
        )
        del bound.modules[path]
    bound.kernel = adapter if len(adapter) else None


def _add(weights: ModuleWeights, primitive: ModulePrimitive, device: torch.device) -> None:
    match primitive:
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
            weights.rows = (upload(ids, torch.int64, device), rows)
        case Bottleneck():
            weights.bottleneck = primitive


__all__ = [
    "FEWEST_ROUNDED",
    "BoundAdapter",
    "Layout",
    "LowRankFactors",
    "ModuleWeights",
    "PackedAdapter",
    "PackedSize",
    "bind",
    "pack",
    "packed_size",
    "read_packed",
    "round_factors",
    "save_packed",
]
