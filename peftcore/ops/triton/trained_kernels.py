"""The kernels of training: each program computes one tile of one part.

`trained_tables` says what the lists hold. Three products serve both directions:

    shrink   low = x Aᵀ             back: grad_low = scale · grad B
    expand   y += scale · low Bᵀ    back: grad_x += grad_low A
    outer    grad_A = grad_lowᵀ x, and of B: grad_Bᵀ = scale · lowᵀ grad

A part's values in `low` are `[rows, rank]` float32, of each split of the features summed; in
`before` its rows of y before their scale. Sums are float32, each in one order that follows from the
part and the module's sizes alone; there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftcore.ops.triton.kernels import RANKS

#: Of a part: its number of rows, its rank and the bits of its float32 scale; addresses of a, b, v,
#: of its rows of x and of y (backward: of y's gradient), and of the gradients (0: not wanted);
#: where its values begin in `low` and in `before`.
FIELDS = tl.constexpr(14)
(
    NUM_ROWS, RANK, SCALE, A, B, V, X, Y, GRAD_A, GRAD_B, GRAD_V, GRAD_X, LOW, BEFORE
) = map(tl.constexpr, range(FIELDS))  # fmt: skip

#: Rows of a block; and of one program of what is summed over them.
ROWS = tl.constexpr(32)
CHUNK = tl.constexpr(512)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _scale(part):
    return tl.load(part + SCALE).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _low(low, part, size, rows, ranks, num_rows, rank, SPLITS: tl.constexpr):
    """A part's values of `low`, `[rows, ranks]`, the splits added in order."""
    places = low + tl.load(part + LOW) + rows[:, None] * rank + ranks[None, :]
    mask = (rows < num_rows)[:, None] & (ranks < rank)[None, :]
    total = tl.load(places, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(places + split * size, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["size"])
def shrink_kernel(
    parts, items, low, features, size,
    BACK: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """low[split] of an item's rows and ranks.  Grid: items, splits of the features."""
    item = items + tl.program_id(0) * 3
    split = tl.program_id(1)
    part = parts + tl.load(item) * FIELDS
    num_rows = tl.load(part + NUM_ROWS)
    rank = tl.load(part + RANK)
    rows = tl.load(item + 1) + tl.arange(0, ROWS)
    ranks = tl.load(item + 2) + tl.arange(0, RANKS)
    if BACK:
        source = _pointer(tl.load(part + Y), TYPE, ALIGNED)
        factors = _pointer(tl.load(part + B), tl.float32, ALIGNED)
    else:
        source = _pointer(tl.load(part + X), TYPE, ALIGNED)
        factors = _pointer(tl.load(part + A), tl.float32, ALIGNED)
    total = tl.zeros([ROWS, RANKS], tl.float32)
    start = split * SPLIT
    for k in range(start, tl.minimum(start + SPLIT, features), STEP):
        ks = k + tl.arange(0, STEP)
        inside = ks < features
        values = tl.load(
            source + rows[:, None] * features + ks[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        mask = inside[:, None] & (ranks < rank)[None, :]
        if BACK:
            factor = tl.load(factors + ks[:, None] * rank + ranks[None, :], mask=mask, other=0.0)
        else:
            places = factors + ranks[:, None] * features + ks[None, :]
            factor = tl.trans(tl.load(places, mask=tl.trans(mask), other=0.0))
        total += tl.dot(values, factor, input_precision=PRECISION)
    if BACK:
        total *= _scale(part)
    tl.store(
        low + split * size + tl.load(part + LOW) + rows[:, None] * rank + ranks[None, :],
        total,
        mask=(rows < num_rows)[:, None] & (ranks < rank)[None, :],
    )


@triton.jit(do_not_specialize=["size"])
def expand_kernel(
    parts, blocks, low, before, features, size,
    BACK: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block's rows of y += scale · low Bᵀ, kept in `before`, then ⊙ v; back: grad_x += low A.

    Grid: blocks, tiles of `COLUMNS` features.
    """
    block = blocks + tl.program_id(0) * 2
    part = parts + tl.load(block) * FIELDS
    num_rows = tl.load(part + NUM_ROWS)
    rank = tl.load(part + RANK)
    rows = tl.load(block + 1) + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    if BACK:
        target = tl.load(part + GRAD_X)
        factors = _pointer(tl.load(part + A), tl.float32, ALIGNED)
    else:
        target = tl.load(part + Y)
        factors = _pointer(tl.load(part + B), tl.float32, ALIGNED)
    if target != 0:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            mask = (ranks < rank)[:, None] & inside[None, :]
            if BACK:
                places = factors + ranks[:, None] * features + columns[None, :]
                factor = tl.load(places, mask=mask, other=0.0)
            else:
                places = factors + columns[:, None] * rank + ranks[None, :]
                factor = tl.trans(tl.load(places, mask=tl.trans(mask), other=0.0))
            kept = _low(low, part, size, rows, ranks, num_rows, rank, SPLITS)
            total += tl.dot(kept, factor, input_precision=PRECISION)
        if not BACK:
            total *= _scale(part)
        offsets = rows[:, None] * features + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        places = _pointer(target, TYPE, ALIGNED) + offsets
        total += tl.load(places, mask=mask, other=0.0).to(tl.float32)
        if not BACK:
            v = tl.load(part + V)
            if v != 0:
                tl.store(before + tl.load(part + BEFORE) + offsets, total.to(TYPE), mask=mask)
                scales = _pointer(v, tl.float32, ALIGNED)
                total *= tl.load(scales + columns, mask=inside, other=0.0)[None, :]
        tl.store(places, total.to(TYPE), mask=mask)


@triton.jit
def scale_back_kernel(
    parts, scaled, before, slots, features, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """grad_v = Σ grad ⊙ before over a chunk's rows, and grad ⊙ v in the place of grad.

    Grid: chunks of the parts with a v, tiles of `COLUMNS` features.
    """
    chunk = scaled + tl.program_id(0) * 4
    part = parts + tl.load(chunk) * FIELDS
    first = tl.load(chunk + 2)
    num_rows = tl.minimum(tl.load(part + NUM_ROWS), first + CHUNK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    grad = _pointer(tl.load(part + Y), TYPE, ALIGNED)
    v = tl.load(_pointer(tl.load(part + V), tl.float32, ALIGNED) + columns, mask=inside, other=0.0)
    kept = before + tl.load(part + BEFORE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = rows[:, None] * features + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        values = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        total += values * tl.load(kept + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + offsets, (values * v[None, :]).to(TYPE), mask=mask)
    slot = tl.load(chunk + 3)
    target = tl.load(part + GRAD_V)
    if target != 0:
        place = _pointer(target, tl.float32, ALIGNED)
        if slot >= 0:
            place = slots + slot * features
        tl.store(place + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def scale_sum_kernel(parts, sums, slots, features, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """grad_v of several chunks.  Grid: sums, tiles of `COLUMNS` features."""
    row = sums + tl.program_id(0) * 4
    part = parts + tl.load(row) * FIELDS
    first = tl.load(row + 2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    target = tl.load(part + GRAD_V)
    if target != 0:
        total = tl.zeros([COLUMNS], tl.float32)
        for slot in range(first, first + tl.load(row + 3)):
            total += tl.load(slots + slot * features + columns, mask=inside, other=0.0)
        tl.store(_pointer(target, tl.float32, ALIGNED) + columns, total, mask=inside)


@triton.jit
def _store_outer(part, total, ranks, columns, features, OF_B: tl.constexpr, ALIGNED: tl.constexpr):
    """The sum, `[ranks, columns]`, as that part of a gradient."""
    rank = tl.load(part + RANK)
    mask = (ranks < rank)[:, None] & (columns < features)[None, :]
    if OF_B:
        pointer = _pointer(tl.load(part + GRAD_B), tl.float32, ALIGNED)
        places = pointer + columns[:, None] * rank + ranks[None, :]
        tl.store(places, tl.trans(total * _scale(part)), mask=tl.trans(mask))
    else:
        pointer = _pointer(tl.load(part + GRAD_A), tl.float32, ALIGNED)
        tl.store(pointer + ranks[:, None] * features + columns[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["size"])
def outer_kernel(
    parts, groups, low, slots, features, size,
    OF_B: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_A = lowᵀ x, where low is grad_low; of B: grad_Bᵀ = scale · lowᵀ grad.

    Grid: chunks of groups of ranks, tiles of `COLUMNS` features.
    """
    group = groups + tl.program_id(0) * 4
    part = parts + tl.load(group) * FIELDS
    first = tl.load(group + 2)
    num_rows = tl.minimum(tl.load(part + NUM_ROWS), first + CHUNK)
    rank = tl.load(part + RANK)
    ranks = tl.load(group + 1) + tl.arange(0, RANKS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < features)[None, :]
    if OF_B:
        target = tl.load(part + GRAD_B)
        source = _pointer(tl.load(part + Y), TYPE, ALIGNED)
    else:
        target = tl.load(part + GRAD_A)
        source = _pointer(tl.load(part + X), TYPE, ALIGNED)
    if target != 0:
        total = tl.zeros([RANKS, COLUMNS], tl.float32)
        for start in range(first, num_rows, ROWS):
            rows = start + tl.arange(0, ROWS)
            values = tl.load(
                source + rows[:, None] * features + columns[None, :],
                mask=(rows < num_rows)[:, None] & inside, other=0.0,
            ).to(tl.float32)  # fmt: skip
            kept = _low(low, part, size, rows, ranks, num_rows, rank, SPLITS)
            total += tl.dot(tl.trans(kept), values, input_precision=PRECISION)
        slot = tl.load(group + 3)
        if slot >= 0:
            places = tl.arange(0, RANKS)[:, None] * features + columns[None, :]
            mask = (ranks >= 0)[:, None] & inside
            tl.store(slots + slot * (RANKS * features) + places, total, mask=mask)
        else:
            _store_outer(part, total, ranks, columns, features, OF_B, ALIGNED)


@triton.jit
def outer_sum_kernel(
    parts, sums, slots, features, OF_B: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The gradient of several chunks.  Grid: sums, tiles of `COLUMNS` features."""
    row = sums + tl.program_id(0) * 4
    part = parts + tl.load(row) * FIELDS
    first = tl.load(row + 2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(part + GRAD_B) if OF_B else tl.load(part + GRAD_A)
    if target != 0:
        total = tl.zeros([RANKS, COLUMNS], tl.float32)
        ranks = tl.arange(0, RANKS)
        places = slots + ranks[:, None] * features + columns[None, :]
        mask = (ranks >= 0)[:, None] & (columns < features)[None, :]
        for slot in range(first, first + tl.load(row + 3)):
            total += tl.load(places + slot * (RANKS * features), mask=mask, other=0.0)
        ranks += tl.load(row + 1)
        _store_outer(part, total, ranks, columns, features, OF_B, ALIGNED)
