"""Paged attention in Triton, for GPUs: a step's keys and values are written, then all rows attend.

Knows tensors and block tables, nothing of sequences or models. One kernel serves decode rows and
prompt chunks, in two launches of unlike tile sizes: an item is a single row, or up to `TILE_ROWS`
rows of a chunk. The query heads of one key-value head are rows of one tile, so nothing is repeated.
Which tile and which split of its context a row falls into follows from its own chunk and position
alone: what else is in the batch does not change its result.

Own kernels rather than FlashInfer's or flash-attn's: the pool's blocks have transposed keys, which
neither reads; softcap, windows and sinks are wanted at once; and prefixes of adapters are ordinary
blocks here, so a library's cascades would find nothing to do.

The sizes below are guesses; `loadtests/gpu.py` is to tune them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcore.upload import staging

#: Rows of a chunk in one item.
TILE_ROWS = 64
#: Queries (rows times query heads of a kv head) of one program, at most. Single rows take as few as
#: their heads need, but 16, the least that matrix units multiply.
BLOCK_QUERIES = 64
_LEAST_QUERIES = 16
#: Positions between two updates of the running maximum; fewer where heads are wide.
BLOCK_POSITIONS = 64
_WIDE_HEAD = 128
#: A single row's context is split into parts of at least so many positions, and at most so many
#: parts (a power of two), which run side by side.
SPLIT_POSITIONS = 256
MAX_SPLITS = 32
#: Rows whose keys and values one program writes.
WRITE_ROWS = 8

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
#: A score below all others: finite, because of -∞ - -∞ there is no exponential.
_HIDDEN = tl.constexpr(-1e30)
#: Numbers of an item: first row, rows, first row's position, its sequence's length, place of its
#: sequence's first block. The kernels read them by place.
_ITEM = 5

#: Rows [start, end) of the batch are positions position.. of one sequence, with its blocks.
Chunk = tuple[int, int, int, Sequence[int]]


class Scores(NamedTuple):
    """How scores are made.

    Attributes:
        scale: factor of the dot products.
        window: positions that a row sees, its own included.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: `[heads]` logits that take probability and have no value.
        causal: does a row see no position behind its own? Else it sees all up to its chunk's last.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    causal: bool = True


class Capacity(NamedTuple):
    """What a plan can hold. All grids follow from it, whatever is in the plan.

    Attributes:
        singles: chunks of one row.
        tiles: items of longer chunks, `TILE_ROWS` rows each.
        blocks: entries of all block tables together.
        context_len: positions of the longest sequence.
    """

    singles: int
    tiles: int
    blocks: int
    context_len: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Capacity:
        """What exactly these take."""
        lens = [end - start for start, end, _, _ in chunks]
        return cls(
            singles=lens.count(1),
            tiles=sum(-(-n // TILE_ROWS) for n in lens if n != 1),
            blocks=sum(len(table) for _, _, _, table in chunks),
            context_len=max((c[2] + n for c, n in zip(chunks, lens, strict=True)), default=0),
        )


class Plan:
    """A step's items and block tables on the device, the same for all layers of any shape.

    The tensors stay where they are for the plan's life and the launches depend on the capacity
    alone, so launches that were captured in a CUDA graph run what the last `update_` put in.
    """

    def __init__(self, capacity: Capacity, device: torch.device, *, exact: bool = False) -> None:
        """exact: will every row of the batch be in a chunk? Else rows in none come out as zeros."""
        self.capacity = capacity
        self.exact = exact
        self.num_splits = min(MAX_SPLITS, max(1, -(-capacity.context_len // SPLIT_POSITIONS)))
        self._num_items = _ITEM * (capacity.singles + capacity.tiles)
        size = self._num_items + capacity.blocks
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        singles, tiles, self.blocks = self._buffer.split(
            [_ITEM * capacity.singles, _ITEM * capacity.tiles, capacity.blocks]
        )
        self.singles, self.tiles = singles.view(-1, _ITEM), tiles.view(-1, _ITEM)

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device) -> Plan:
        """A plan for one step whose every row is in one of `chunks`."""
        plan = cls(Capacity.of(chunks), device, exact=True)
        plan.update_(chunks)
        return plan

    def update_(self, chunks: Sequence[Chunk]) -> None:
        """Hold these chunks and no others: one copy to the device, for which the host does not
        wait where the device is a GPU.

        Raises:
            ValueError: they are more than the capacity.
        """
        need = Capacity.of(chunks)
        over = [f for f, n, c in zip(need._fields, need, self.capacity, strict=True) if n > c]
        if over:
            raise ValueError(f"the plan has no room for {need}: {', '.join(over)}")
        used = self._num_items + need.blocks
        host = staging(used, torch.int32, self._buffer.device)
        flat = host.numpy()
        flat[: self._num_items] = 0
        items = flat[: self._num_items].reshape(-1, _ITEM)
        flat[self._num_items :] = np.fromiter(
            chain.from_iterable(table for _, _, _, table in chunks), np.int32, need.blocks
        )
        single, tile, offset = 0, self.capacity.singles, 0
        for start, end, position, table in chunks:
            context_len = position + end - start
            if end - start == 1:
                items[single] = start, 1, position, context_len, offset
                single += 1
            else:
                firsts = np.arange(start, end, TILE_ROWS)
                own = items[tile : tile + len(firsts)]
                own[:, 0] = firsts
                own[:, 1] = np.minimum(end - firsts, TILE_ROWS)
                own[:, 2] = position + firsts - start
                own[:, 3:] = context_len, offset
                tile += len(firsts)
            offset += len(table)
        self._buffer[:used].copy_(host, non_blocking=True)


def write(
    slots: Tensor, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    """Put the rows' keys and values into their slots.

    Semantics: cache[slot] = clamp(row, -most, most), most the largest number of the cache's dtype.

    Args:
        slots: `[rows]` int64, block · block_size + place; a row whose slot is negative is left out.
        keys: `[rows, kv_heads, head_dim]`; values: `[rows, kv_heads, v_head_dim]`; any strides.
        key_cache: `[blocks, kv_heads, head_dim, block_size]`, contiguous.
        value_cache: `[blocks, kv_heads, block_size, v_head_dim]`, contiguous.
    """
    num_rows, kv_heads, dim = keys.shape
    v_dim = values.shape[2]
    keys, values = _rows_of_one(keys), _rows_of_one(values)
    _write_kernel[(triton.cdiv(num_rows, WRITE_ROWS), kv_heads)](
        slots, keys, values, key_cache, value_cache, num_rows,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        MOST=torch.finfo(key_cache.dtype).max, KV_HEADS=kv_heads, DIM=dim, V_DIM=v_dim,
        DIM_P=triton.next_power_of_2(dim), V_P=triton.next_power_of_2(v_dim),
        BLOCK_SIZE=key_cache.shape[3], ROWS=WRITE_ROWS,
    )  # fmt: skip


def attend(
    plan: Plan, queries: Tensor, key_cache: Tensor, value_cache: Tensor, scores: Scores
) -> Tensor:
    """Attention of every row to its own sequence's cached positions.

    Semantics: softmax(score(q, K)) V over the positions that the row sees, in float32 by an online
    softmax (arXiv:2205.14135); single rows' long contexts in parts that are then put together
    (flash-decoding).

    Args:
        plan: of the step's rows, whose own keys and values are in the cache.
        queries: `[rows, heads, head_dim]`, any strides.
        key_cache, value_cache: as for `write`.

    Returns:
        `[rows, heads, v_head_dim]` in the queries' dtype, contiguous.
    """
    num_rows, heads, _ = queries.shape
    queries = _rows_of_one(queries)
    make = torch.empty if plan.exact else torch.zeros
    out = make(num_rows, heads, value_cache.shape[3], dtype=queries.dtype, device=queries.device)
    if plan.capacity.singles:
        _launch(
            plan, plan.singles, 1, plan.num_splits, queries, key_cache, value_cache, out, scores
        )
    if plan.capacity.tiles:
        _launch(plan, plan.tiles, TILE_ROWS, 1, queries, key_cache, value_cache, out, scores)
    return out


def _rows_of_one(x: Tensor) -> Tensor:
    """With neighbouring values of a head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _launch(
    plan: Plan,
    items: Tensor,
    item_rows: int,
    num_splits: int,
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    scores: Scores,
) -> None:
    """Attend for items of at most `item_rows` rows, each context in at most `num_splits` parts."""
    _, heads, dim = queries.shape
    _, kv_heads, block_size, v_dim = value_cache.shape
    group = heads // kv_heads
    queries_p = min(BLOCK_QUERIES, triton.next_power_of_2(max(_LEAST_QUERIES, item_rows * group)))
    wide = max(dim, v_dim) > _WIDE_HEAD
    num_blocks = triton.cdiv(item_rows * group, queries_p)
    # Of each part of a context its values' weighted sum; and its scores' maximum, and weights' sum.
    parts = out
    stats = out
    if num_splits > 1:
        shape = (len(items), heads, num_splits)
        parts = torch.empty(*shape, v_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=out.device)
    options = {
        "HAS_SINKS": scores.sinks is not None, "WINDOW": scores.window or 0,
        "CAUSAL": scores.causal, "HEADS": heads, "V_DIM": v_dim,
        "V_P": max(16, triton.next_power_of_2(v_dim)),
        "POSITIONS": BLOCK_POSITIONS // 2 if wide else BLOCK_POSITIONS,
        "LEAST": SPLIT_POSITIONS, "MOST": MAX_SPLITS if num_splits > 1 else 1,
    }  # fmt: skip
    sinks = out if scores.sinks is None else scores.sinks
    _attend_kernel[(len(items), kv_heads, num_blocks * num_splits)](
        items, plan.blocks, queries, key_cache, value_cache, sinks, out, parts, stats,
        queries.stride(0), queries.stride(1), scores.scale, num_splits,
        SOFTCAP=scores.softcap or 0.0, KV_HEADS=kv_heads, DIM=dim,
        DIM_P=max(16, triton.next_power_of_2(dim)), BLOCK_SIZE=block_size, QUERIES=queries_p,
        # The interpreter multiplies no bfloat16.
        COMPUTE=_DTYPES[queries.dtype] if queries.is_cuda else tl.float32, **options,
    )  # fmt: skip
    if num_splits > 1:
        _combine_kernel[(len(items), heads)](items, sinks, out, parts, stats, num_splits, **options)


# -- kernels -------------------------------------------------------------------------------------


@triton.jit
def _write_kernel(
    slots, keys, values, key_cache, value_cache, num_rows,
    key_row, key_head, value_row, value_head,
    MOST: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIM_P: tl.constexpr, V_P: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    kept = (slot >= 0)[:, None]
    at = slot // BLOCK_SIZE * KV_HEADS + head
    place = slot % BLOCK_SIZE
    d = tl.arange(0, DIM_P)[None, :]
    mask = kept & (d < DIM)
    x = tl.load(keys + rows[:, None] * key_row + head * key_head + d, mask=mask, other=0)
    to = key_cache + (at[:, None] * DIM + d) * BLOCK_SIZE + place[:, None]
    tl.store(to, _within(x, MOST).to(key_cache.dtype.element_ty), mask=mask)
    d = tl.arange(0, V_P)[None, :]
    mask = kept & (d < V_DIM)
    x = tl.load(values + rows[:, None] * value_row + head * value_head + d, mask=mask, other=0)
    to = value_cache + (at * BLOCK_SIZE + place)[:, None] * V_DIM + d
    tl.store(to, _within(x, MOST).to(value_cache.dtype.element_ty), mask=mask)


@triton.jit
def _within(x, MOST: tl.constexpr):
    """x between -MOST and MOST, in float32; NaN stays what it is."""
    x = x.to(tl.float32)
    return tl.where(x > MOST, MOST, tl.where(x < -MOST, -MOST, x))


@triton.jit
def _span(first, last, length, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr):
    """The positions [low, high) that rows at positions first..last see, low a whole block's."""
    high = last + 1 if CAUSAL else length
    low = first * 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // POSITIONS * POSITIONS
    return low, high


@triton.jit
def _parts(low, high, POSITIONS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """How many parts these positions have, at least one, and how many positions a part."""
    count = tl.cdiv(high - low, POSITIONS)
    each = tl.maximum(count, 1)
    if MOST > 1:
        each = tl.maximum(tl.cdiv(count, MOST), LEAST // POSITIONS)
    return tl.maximum(tl.cdiv(count, each), 1), each * POSITIONS


@triton.jit
def _share(total, maximum, sink):
    """What the sums of values are to be multiplied with, a sink taken into account."""
    top = tl.maximum(maximum, sink)
    total = total * tl.exp(maximum - top) + tl.exp(sink - top)
    return tl.exp(maximum - top) / total


@triton.jit
def _attend_kernel(
    items, blocks, queries, key_cache, value_cache, sinks, out, parts, stats,
    query_row, query_head, scale, num_splits,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIM_P: tl.constexpr, V_P: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr,
    POSITIONS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (item, kv head, block of its queries and part of its context); query v of an item is
    head v % GROUP of row v // GROUP."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2) % num_splits
    block = tl.program_id(2) // num_splits
    row0 = tl.load(items + index * 5)
    num_rows = tl.load(items + index * 5 + 1)
    position0 = tl.load(items + index * 5 + 2)
    length = tl.load(items + index * 5 + 3)
    table = blocks + tl.load(items + index * 5 + 4)
    v = block * QUERIES + tl.arange(0, QUERIES)
    count = num_rows * GROUP
    if block * QUERIES >= count:
        return
    last = tl.minimum(block * QUERIES + QUERIES, count) - 1
    first_position = position0 + block * QUERIES // GROUP
    low, high = _span(first_position, position0 + last // GROUP, length, WINDOW, CAUSAL, POSITIONS)
    own_splits, split_len = _parts(low, high, POSITIONS, LEAST, MOST)
    if split >= own_splits:
        return
    valid = v < count
    position = position0 + v // GROUP
    head = kv_head * GROUP + v % GROUP
    row = (row0 + v // GROUP).to(tl.int64)
    d = tl.arange(0, DIM_P)
    dv = tl.arange(0, V_P)
    q = tl.load(
        queries + (row * query_row + head.to(tl.int64) * query_head)[:, None] + d[None, :],
        mask=valid[:, None] & (d < DIM)[None, :], other=0,
    ).to(COMPUTE)  # fmt: skip
    maximum = tl.full([QUERIES], _HIDDEN, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, V_P], tl.float32)
    begin = low + split * split_len
    end = tl.minimum(begin + split_len, high)
    for start in range(begin, end, POSITIONS):
        seen = start + tl.arange(0, POSITIONS)
        # What no row of the tile sees is not read: it may be another's, or nobody's.
        readable = seen < end
        if WINDOW > 0:
            readable = readable & (seen > first_position - WINDOW)
        number = tl.load(table + seen // BLOCK_SIZE, mask=readable, other=0).to(tl.int64)
        at = number * KV_HEADS + kv_head
        place = seen % BLOCK_SIZE
        k = tl.load(
            key_cache + (at * (DIM * BLOCK_SIZE) + place)[None, :] + (d * BLOCK_SIZE)[:, None],
            mask=(d < DIM)[:, None] & readable[None, :], other=0,
        ).to(COMPUTE)  # fmt: skip
        score = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0:
            # tanh |x| by an exponential that cannot overflow.
            e = tl.exp(tl.abs(score) * (-2.0 / SOFTCAP))
            capped = SOFTCAP * (1 - e) / (1 + e)
            score = tl.where(score < 0, -capped, capped)
        visible = readable[None, :] & valid[:, None]
        if CAUSAL:
            visible = visible & (seen[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (seen[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score, _HIDDEN)
        top = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.where(visible, tl.exp(score - top[:, None]), 0.0)
        shrink = tl.exp(maximum - top)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            value_cache + ((at * BLOCK_SIZE + place) * V_DIM)[:, None] + dv[None, :],
            mask=readable[:, None] & (dv < V_DIM)[None, :], other=0,
        ).to(COMPUTE)  # fmt: skip
        sums = sums * shrink[:, None] + tl.dot(weight.to(COMPUTE), value, input_precision="ieee")
        maximum = top
    mask = valid[:, None] & (dv < V_DIM)[None, :]
    if own_splits == 1:
        total = tl.where(valid, total, 1.0)
        share = 1 / total
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0).to(tl.float32)
            share = _share(total, maximum, sink)
        to = out + ((row * HEADS + head) * V_DIM)[:, None] + dv[None, :]
        tl.store(to, (sums * share[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        part = (index.to(tl.int64) * HEADS + head) * num_splits + split
        tl.store(parts + (part * V_DIM)[:, None] + dv[None, :], sums, mask=mask)
        tl.store(stats + part * 2, maximum, mask=valid)
        tl.store(stats + part * 2 + 1, total, mask=valid)


@triton.jit
def _combine_kernel(
    items, sinks, out, parts, stats, num_splits,
    HAS_SINKS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr,
    V_DIM: tl.constexpr, V_P: tl.constexpr, POSITIONS: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Program (single row, head): its parts, in one order whatever the grid is."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(items + index * 5).to(tl.int64)
    num_rows = tl.load(items + index * 5 + 1)
    position = tl.load(items + index * 5 + 2)
    length = tl.load(items + index * 5 + 3)
    low, high = _span(position, position, length, WINDOW, CAUSAL, POSITIONS)
    own_splits, _ = _parts(low, high, POSITIONS, LEAST, MOST)
    if num_rows * own_splits <= 1:
        return
    s = tl.arange(0, MOST)
    dv = tl.arange(0, V_P)
    own = s < own_splits
    part = (index.to(tl.int64) * HEADS + head) * num_splits + s
    maxima = tl.load(stats + part * 2, mask=own, other=_HIDDEN)
    totals = tl.load(stats + part * 2 + 1, mask=own, other=0)
    mask = own[:, None] & (dv < V_DIM)[None, :]
    sums = tl.load(parts + (part * V_DIM)[:, None] + dv[None, :], mask=mask, other=0)
    maximum = tl.max(maxima, 0)
    factor = tl.exp(maxima - maximum)
    total = tl.sum(totals * factor, 0)
    share = 1 / total
    if HAS_SINKS:
        share = _share(total, maximum, tl.load(sinks + head).to(tl.float32))
    found = tl.sum(sums * factor[:, None], 0) * share
    to = out + (row * HEADS + head) * V_DIM + dv
    tl.store(to, found.to(out.dtype.element_ty), mask=dv < V_DIM)
