"""What the kernels read of adapters and batches: tables of int64 on the device.

An adapter's table is made once, when it is bound: a row of `FIELDS` for each module, with addresses
of its tensors where they lie in the arena. A batch holds no more than the addresses of those
tables and its lists of work, so that a step copies some kilobytes whatever the number of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
import triton
from torch import Tensor

from peftcore.ops.tiles import num_tiles
from peftcore.upload import staging, upload

#: Of an adapter at a module: addresses of A, B, input scale, output scale and bias (0: none), the
#: rank (0: no update), the bits of its float32 scale, codes of the factors' and vectors' dtypes.
FIELDS = 9
A, B, IN_SCALE, OUT_SCALE, BIAS, RANK, SCALE, FACTOR_TYPE, VECTOR_TYPE = range(FIELDS)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: Rows of a block of a batch, and ranks of an item: one tile of the matrix units.
ROWS = 16
RANKS = 16


@dataclass(eq=False)
class Sites:
    """Where an adapter acts, whatever its values: one object for all adapters of the same sites, so
    that a batch of many asks few.

    Attributes:
        sizes: module's id → (in, out).
        scaling: ids of the modules whose input it scales.
    """

    sizes: dict[int, tuple[int, int]]
    scaling: frozenset[int]


_sites: WeakValueDictionary[frozenset[tuple[int, int, int, bool]], Sites] = WeakValueDictionary()


class Adapter:
    """A resident adapter: what it does at each module, by the module's id.

    Attributes:
        max_rank: of its updates.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._held: list[Tensor] = []
        self._bound: Bound | None = None
        self.max_rank = 0

    def __len__(self) -> int:
        return len(self._rows)

    def set(
        self,
        id: int,
        in_: int,
        out: int,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        scale: float = 0.0,
        in_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """See `peftcore.ops.Kernels`. Raises ValueError for what the kernels would misread."""
        row = [0] * FIELDS
        if (a is None) != (b is None):
            raise ValueError("a and b come together")
        if a is not None and b is not None:
            rank = len(a)
            _check("a", a, rank * in_, a.dtype)
            _check("b", b, num_tiles(out) * 16 * rank, a.dtype)
            row[A], row[B], row[RANK] = a.data_ptr(), b.data_ptr(), rank
            row[SCALE] = int(np.float32(scale).view(np.int32))
            row[FACTOR_TYPE] = TYPES[a.dtype]
            self.max_rank = max(self.max_rank, rank)
        vectors = [("in_scale", in_scale, in_), ("out_scale", out_scale, out), ("bias", bias, out)]
        there = [v for _, v, _ in vectors if v is not None]
        for field, (name, vector, size) in zip((IN_SCALE, OUT_SCALE, BIAS), vectors, strict=True):
            if vector is not None:
                _check(name, vector, size, there[0].dtype)
                row[field] = vector.data_ptr()
        if there:
            row[VECTOR_TYPE] = TYPES[there[0].dtype]
        self._held += [t for t in (a, b, *there) if t is not None]
        self._rows[id] = row
        self._sizes[id] = (in_, out)
        self._bound = None

    def set_low_rank(
        self,
        buffer: Tensor,
        updates: Sequence[tuple[int, int, int, int, torch.dtype, float, int, int, int]],
    ) -> None:
        """See `peftcore.ops.Kernels`. Raises ValueError for what the kernels would misread."""
        start = buffer.data_ptr()
        for id, in_, out, rank, dtype, scale, a, b, _ in updates:
            if dtype not in TYPES:
                raise ValueError(f"a: {dtype} is not supported")
            for name, at, size in (("a", a, rank * in_), ("b", b, num_tiles(out) * 16 * rank)):
                if at < 0 or at + size * dtype.itemsize > buffer.numel():
                    raise ValueError(f"{name}: {size} values at {at} lie outside the buffer")
            row = [0] * FIELDS
            row[A], row[B], row[RANK] = start + a, start + b, rank
            row[SCALE] = int(np.float32(scale).view(np.int32))
            row[FACTOR_TYPE] = TYPES[dtype]
            self.max_rank = max(self.max_rank, rank)
            self._rows[id] = row
            self._sizes[id] = (in_, out)
        self._held.append(buffer)
        self._bound = None

    @property
    def bound(self) -> Bound:
        """Its table, made at the first call after `set`; it stays where it is until the next."""
        if self._bound is None:
            first = min(self._rows, default=0)
            host = np.zeros((max(self._rows, default=first) - first + 1, FIELDS), np.int64)
            for id, row in self._rows.items():
                host[id - first] = row
            device = self._held[0].device if self._held else torch.device("cpu")
            table = upload(host, torch.int64, device)
            scaling = frozenset(id for id, row in self._rows.items() if row[IN_SCALE])
            key = frozenset((id, *size, id in scaling) for id, size in self._sizes.items())
            sites = _sites.get(key)
            if sites is None:
                sites = _sites[key] = Sites(dict(self._sizes), scaling)
            self._bound = Bound(table, (table.data_ptr(), first, len(table)), sites)
        return self._bound


class Bound(NamedTuple):
    """table: `[ids from first to last, FIELDS]` on the device, zeros where nothing is done; record:
    its address, first id and length, for a segment's row."""

    table: Tensor
    record: tuple[int, int, int]
    sites: Sites


def _check(name: str, tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.numel() != size or not tensor.is_contiguous():
        raise ValueError(f"{name}: {tuple(tensor.shape)} is not {size} contiguous values")
    if tensor.dtype != dtype or dtype not in TYPES:
        raise ValueError(f"{name}: {tensor.dtype} is not supported, or beside {dtype}")


class Capacity(NamedTuple):
    """What a batch's buffer has room for.

    Attributes:
        segments: ranges of rows with an adapter.
        blocks: up to `ROWS` rows with the same segments: what one program of the expand computes.
        entries: segments of all blocks.
        items: up to `RANKS` ranks of all entries: what one program of the shrink computes.
    """

    segments: int
    blocks: int
    entries: int
    items: int

    def holds(self, other: Capacity) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


#: Fields of a row of each list: a segment's table, its first id, its number of ids, the bits of its
#: weight; a block's first row, number of rows, first entry and number of entries; an entry's
#: segment and first item; an item's first row, number of rows, segment and first rank.
WIDTHS = Capacity(4, 4, 2, 4)

Given = Sequence[tuple[int, int, Adapter, float]]


class Batch:
    """A step's segments on the device: rows [start, end) use an adapter, what adds times a weight.

    The grids of the launches are those of `capacity`; what a batch does not use of it is empty. Of
    a batch with a capacity that was given the buffer never moves: a captured graph may read it, and
    `update_` makes it another step's. Such a batch says of every module that it touches it.

    Segments may overlap in any way; a row takes them in the order in which they are given.

    Args:
        may_scale_inputs: does a batch with a capacity take adapters that scale inputs? That costs
            launches at every module.

    Attributes:
        segments, blocks, entries, items: int64 `[capacity, WIDTHS]`, views of one buffer.
        num_rows: rows that x must have.
    """

    def __init__(
        self,
        given: Given,
        capacity: Capacity | None = None,
        device: torch.device | str | None = None,
        *,
        may_scale_inputs: bool = True,
    ) -> None:
        self.static = capacity is not None
        self._may_scale_inputs = may_scale_inputs
        lists = _lists(given)
        self.capacity = capacity or Capacity(*map(len, lists))
        if device is None:
            device = given[0][2].bound.table.device if given else "cpu"
        sizes = [n * width for n, width in zip(self.capacity, WIDTHS, strict=True)]
        self._buffer = torch.zeros(max(1, sum(sizes)), dtype=torch.int64, device=device)
        views = self._buffer[: sum(sizes)].split(sizes)
        self.segments, self.blocks, self.entries, self.items = (
            view.view(-1, width) for view, width in zip(views, WIDTHS, strict=True)
        )
        self._write(given, lists)

    def update_(self, given: Given) -> None:
        """Make it the batch of these segments, in one copy that is ordered with the launches.

        Raises ValueError if it does not hold them.
        """
        self._write(given, _lists(given))

    def offer_(self, given: Given) -> bool:
        """`update_`, if it holds them; else nothing is changed."""
        lists = _lists(given)
        if self._refusal(given, lists) is not None:
            return False
        self._write(given, lists)
        return True

    def _refusal(self, given: Given, lists: list[np.ndarray]) -> str | None:
        used = Capacity(*map(len, lists))
        if not self.capacity.holds(used):
            return f"{used} does not fit {self.capacity}"
        if not self._may_scale_inputs and any(a.bound.sites.scaling for _, _, a, _ in given):
            return "an adapter scales inputs"
        return None

    def _write(self, given: Given, lists: list[np.ndarray]) -> None:
        if reason := self._refusal(given, lists):
            raise ValueError(reason)
        buffer = staging(len(self._buffer), torch.int64, self._buffer.device)
        host, start = buffer.numpy(), 0
        host[:] = 0
        for rows, n, width in zip(lists, self.capacity, WIDTHS, strict=True):
            host[start : start + rows.size] = rows.reshape(-1)
            start += n * width
        self._buffer.copy_(buffer, non_blocking=True)
        self.adapters = list({id(adapter): adapter for _, _, adapter, _ in given}.values())
        self.num_rows = max((end for start, end, _, _ in given if end > start), default=0)
        self._sites = list({id(a.bound.sites): a.bound.sites for a in self.adapters}.values())
        acting = {
            id(s): s for s in (a.bound.sites for start, end, a, _ in given if end > start)
        }.values()
        self._ids: frozenset[int] = frozenset().union(*(s.sizes for s in self._sites))
        self._acting: frozenset[int] = frozenset().union(*(s.sizes for s in acting))
        self._scaling: frozenset[int] = frozenset().union(*(s.scaling for s in acting))

    def touches(self, id: int) -> bool:
        return self.static or id in self._ids

    def acts(self, id: int) -> bool:
        """Is there a row that it changes at the module?"""
        return self.static or id in self._acting

    def scales(self, id: int) -> bool:
        """Is there a row whose input it scales at the module?"""
        return (self.static and self._may_scale_inputs) or id in self._scaling

    def check(self, id: int, in_: int, out: int | None, num_rows: int) -> None:
        """Raises ValueError unless its adapters fit a module of these sizes, and x has its rows."""
        if self.num_rows > num_rows:
            raise ValueError(f"segments up to row {self.num_rows} of {num_rows} rows")
        for sites in self._sites:
            sizes = sites.sizes.get(id)
            if sizes is not None and (sizes[0] != in_ or out not in (None, sizes[1])):
                raise ValueError(f"module {id}: an adapter for {sizes[::-1]} meets {(out, in_)}")


def _lists(given: Given) -> list[np.ndarray]:
    """The rows of `WIDTHS`' lists, int64, without Python for each row or module."""
    for start, end, _, _ in given:
        if not 0 <= start <= end:
            raise ValueError(f"segment [{start}, {end})")
    given = [g for g in given if g[1] > g[0]]
    if not given:
        return [np.zeros((0, width), np.int64) for width in WIDTHS]
    segments = np.empty((len(given), WIDTHS.segments), np.int64)
    segments[:, :3] = [adapter.bound.record for _, _, adapter, _ in given]
    segments[:, 3] = np.array([weight for *_, weight in given], np.float32).view(np.int32)
    starts, ends, ranks = (
        np.array(column, np.int64)
        for column in zip(*((s, e, a.max_rank) for s, e, a, _ in given), strict=True)
    )
    # Cut at every segment's bounds: between two of them all rows are in the same segments.
    bounds = np.unique(np.concatenate((starts, ends)))
    first, last = np.searchsorted(bounds, starts), np.searchsorted(bounds, ends)
    segment = np.repeat(np.arange(len(given)), last - first)
    interval = counted(last - first) + np.repeat(first, last - first)
    order = np.lexsort((segment, interval))
    segment, interval = segment[order], interval[order]
    used, first_member, num_members = np.unique(interval, return_index=True, return_counts=True)
    low, high = bounds[used], bounds[used + 1]
    num_blocks = -(-(high - low) // ROWS)

    of = np.repeat(np.arange(len(used)), num_blocks)  # a block's interval
    row = low[of] + ROWS * counted(num_blocks)
    num_rows = np.minimum(ROWS, high[of] - row)
    num_entries = num_members[of]
    blocks = np.stack((row, num_rows, starts_of(num_entries), num_entries), 1)

    block = np.repeat(np.arange(len(of)), num_entries)  # an entry's block
    segment = segment[np.repeat(first_member[of], num_entries) + counted(num_entries)]
    num_items = -(-ranks[segment] // RANKS)
    entries = np.stack((segment, starts_of(num_items)), 1)

    entry = np.repeat(np.arange(len(block)), num_items)  # an item's entry
    at = block[entry]
    items = np.stack((row[at], num_rows[at], segment[entry], RANKS * counted(num_items)), 1)
    return [segments, blocks, entries, items]


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where each begins if so many lie one after another."""
    return np.cumsum(counts) - counts


def counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, … up to each count, one after another."""
    return np.arange(counts.sum()) - np.repeat(starts_of(counts), counts)


def cut(num_rows: np.ndarray, ranks: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """What programs compute of parts with so many rows and ranks each.

    Returns: blocks of up to `most` rows: part, first row in it; and items of a block and up to
        `RANKS` ranks: part, first row, first rank.
    """
    num_blocks = -(-num_rows // most)
    part = np.repeat(np.arange(len(num_rows)), num_blocks)
    blocks = np.stack((part, most * counted(num_blocks)), 1)
    num_items = -(-ranks[part] // RANKS)
    items = np.column_stack((np.repeat(blocks, num_items, axis=0), RANKS * counted(num_items)))
    return blocks, items


def block_of(width: int, most: int) -> int:
    """A power of two of at least 16, no more than is needed."""
    needed: int = triton.next_power_of_2(width)
    return min(most, max(16, needed))


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the launches after it read; the host does not wait for it."""
    given = torch.from_numpy(np.ascontiguousarray(rows))
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given


__all__ = ["Adapter", "Batch", "Capacity"]
