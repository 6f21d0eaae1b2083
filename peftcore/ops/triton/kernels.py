"""The kernels: each program computes one tile, in an order that no other row has a part in.

`tables` says what the lists hold. Sums are in float32. There are no atomics: what is split over
programs (the inputs of a shrink) is kept apart and summed in order by who reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftcore.ops.triton import tables

A = tl.constexpr(tables.A)
B = tl.constexpr(tables.B)
IN_SCALE = tl.constexpr(tables.IN_SCALE)
OUT_SCALE = tl.constexpr(tables.OUT_SCALE)
BIAS = tl.constexpr(tables.BIAS)
RANK = tl.constexpr(tables.RANK)
SCALE = tl.constexpr(tables.SCALE)
FACTOR_TYPE = tl.constexpr(tables.FACTOR_TYPE)
VECTOR_TYPE = tl.constexpr(tables.VECTOR_TYPE)
FIELDS = tl.constexpr(tables.FIELDS)
ROWS = tl.constexpr(tables.ROWS)
RANKS = tl.constexpr(tables.RANKS)
TILE = tl.constexpr(16)  # outputs of a tile of B
SEGMENT = tl.constexpr(tables.WIDTHS.segments)
BLOCK = tl.constexpr(tables.WIDTHS.blocks)
ENTRY = tl.constexpr(tables.WIDTHS.entries)
ITEM = tl.constexpr(tables.WIDTHS.items)


@triton.jit
def _load(address, offsets, mask, type):
    """Values at an address as float32, of a dtype that is known when the kernel runs."""
    if type == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif type == 1:
        half = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0)
        values = half.to(tl.float32)
    else:
        brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0)
        values = brain.to(tl.float32)
    return values


@triton.jit
def _float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _at(segments, segment, id):
    """A segment's row for a module, and whether there is one."""
    at = segments + segment * SEGMENT
    place = id - tl.load(at + 1)
    known = (place >= 0) & (place < tl.load(at + 2))
    table = tl.load(at).to(tl.pointer_type(tl.int64))
    return table + tl.where(known, place, 0) * FIELDS, known


@triton.jit(do_not_specialize=["id0", "id1", "id2", "num_items"])
def shrink_kernel(
    x, segments, items, shrunk, id0, id1, id2, num_items, in_,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """shrunk[module, split, item] `[ROWS, RANKS]` = scale · weight · x Aᵀ over the split's inputs.

    Grid: items, modules · splits.
    """
    item = tl.program_id(0)
    module = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    num_rows = tl.load(items + item * ITEM + 1)
    if num_rows > 0:
        id = id0
        if module == 1:
            id = id1
        if module == 2:
            id = id2
        segment = tl.load(items + item * ITEM + 2)
        at, known = _at(segments, segment, id)
        rank = tl.load(at + RANK, mask=known, other=0)
        ranks = tl.load(items + item * ITEM + 3) + tl.arange(0, RANKS)
        if tl.load(items + item * ITEM + 3) < rank:
            a = tl.load(at + A)
            type = tl.load(at + FACTOR_TYPE)
            rows = tl.arange(0, ROWS)
            row = tl.load(items + item * ITEM)
            total = tl.zeros([ROWS, RANKS], tl.float32)
            start = split * SPLIT
            for k in range(start, tl.minimum(start + SPLIT, in_), STEP):
                ks = k + tl.arange(0, STEP)
                inside = (ks < in_)[None, :]
                xs = tl.load(
                    x + (row + rows)[:, None] * in_ + ks[None, :],
                    mask=(rows < num_rows)[:, None] & inside, other=0.0,
                ).to(tl.float32)  # fmt: skip
                factors = _load(
                    a, ranks[:, None] * in_ + ks[None, :], (ranks < rank)[:, None] & inside, type
                )
                total += tl.dot(xs, tl.trans(factors), input_precision=PRECISION)
            factor = _float(tl.load(at + SCALE)) * _float(tl.load(segments + segment * SEGMENT + 3))
            out = ((module * SPLITS + split) * num_items + item) * (ROWS * RANKS)
            places = rows[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
            tl.store(shrunk + out + places, total * factor)


@triton.jit(
    do_not_specialize=["id0", "id1", "id2", "out0", "out1", "out2", "tiles0", "tiles1", "num_items"]
)
def expand_kernel(
    y0, y1, y2, segments, blocks, entries, shrunk, id0, id1, id2, out0, out1, out2, tiles0, tiles1,
    num_items, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y += Σ over the entries of shrunk Bᵀ, then y ⊙ output scales, then + weight · biases.

    Grid: blocks, tiles of `COLUMNS` outputs of all modules; the second module's begin at tiles0,
    the third's at tiles1.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    num_rows = tl.load(blocks + block * BLOCK + 1)
    if num_rows > 0:
        module, y, id, out = 0, y0, id0, out0
        if tile >= tiles1:
            module, y, id, out, tile = 2, y2, id2, out2, tile - tiles1
        elif tile >= tiles0:
            module, y, id, out, tile = 1, y1, id1, out1, tile - tiles0
        if ALIGNED:
            out = tl.multiple_of(out, 16)
        rows = tl.arange(0, ROWS)
        ranks = tl.arange(0, RANKS)
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < out
        places = y + (tl.load(blocks + block * BLOCK) + rows)[:, None] * out + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        total = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        first = tl.load(blocks + block * BLOCK + 2)
        last = first + tl.load(blocks + block * BLOCK + 3)
        for entry in range(first, last):
            segment = tl.load(entries + entry * ENTRY)
            at, known = _at(segments, segment, id)
            rank = tl.load(at + RANK, mask=known, other=0)
            b = tl.load(at + B, mask=known, other=0)
            type = tl.load(at + FACTOR_TYPE, mask=known, other=0)
            item = tl.load(entries + entry * ENTRY + 1)
            for start in range(0, rank, RANKS):
                part = (module * SPLITS * num_items + item) * (ROWS * RANKS)
                kept = (rows[:, None] >= 0) & (start + ranks < rank)[None, :]
                low = tl.zeros([ROWS, RANKS], tl.float32)
                for split in range(SPLITS):
                    low += tl.load(
                        shrunk + part + split * num_items * (ROWS * RANKS)
                        + rows[:, None] * RANKS + ranks[None, :],
                        mask=kept, other=0.0,
                    )  # fmt: skip
                factors = _load(
                    b,
                    (columns // TILE * TILE)[None, :] * rank
                    + (start + ranks)[:, None] * TILE
                    + (columns % TILE)[None, :],
                    (start + ranks < rank)[:, None] & inside[None, :],
                    type,
                )
                total += tl.dot(low, factors, input_precision=PRECISION)
                item += 1
        for entry in range(first, last):
            at, known = _at(segments, tl.load(entries + entry * ENTRY), id)
            v = tl.load(at + OUT_SCALE, mask=known, other=0)
            if v != 0:
                total *= _load(v, columns, inside, tl.load(at + VECTOR_TYPE))[None, :]
        for entry in range(first, last):
            segment = tl.load(entries + entry * ENTRY)
            at, known = _at(segments, segment, id)
            v = tl.load(at + BIAS, mask=known, other=0)
            if v != 0:
                weight = _float(tl.load(segments + segment * SEGMENT + 3))
                total += weight * _load(v, columns, inside, tl.load(at + VECTOR_TYPE))[None, :]
        tl.store(places, total.to(y0.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["id"])
def scale_kernel(x, segments, blocks, entries, id, in_, COLUMNS: tl.constexpr):
    """x ⊙ input scales, in place.  Grid: blocks, tiles of `COLUMNS` inputs."""
    block = tl.program_id(0)
    num_rows = tl.load(blocks + block * BLOCK + 1)
    if num_rows > 0:
        rows = tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < in_
        places = x + (tl.load(blocks + block * BLOCK) + rows)[:, None] * in_ + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        values = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        first = tl.load(blocks + block * BLOCK + 2)
        for entry in range(first, first + tl.load(blocks + block * BLOCK + 3)):
            at, known = _at(segments, tl.load(entries + entry * ENTRY), id)
            v = tl.load(at + IN_SCALE, mask=known, other=0)
            if v != 0:
                values *= _load(v, columns, inside, tl.load(at + VECTOR_TYPE))[None, :]
        tl.store(places, values.to(x.dtype.element_ty), mask=mask)
