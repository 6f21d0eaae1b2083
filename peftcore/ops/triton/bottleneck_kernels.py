"""The kernels of bottlenecks: each program computes one tile of one part, at its own width.

    down    inner = down · N(x), over a split of the inputs
    up      f = up · act(inner + down_bias) + up_bias, and what is added to it
    norm    the norm after it, of whole rows

`ops.bottleneck.transform` says what is added and normed where. A part's values in `inner` are
`[rows, width]`; in `raw`, where a norm follows, its rows before that. Sums are float32, each in one
order; there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftcore.ops.triton.kernels import RANKS, ROWS, _float, _load

#: Of a part: its number of rows, the first of them, its width; addresses of its tensors (0: none)
#: and the code of their dtype; what it reads and keeps: of `BRANCH`, `STREAM` and `NORMED` those
#: that are added up; its activation's code; is its input normalized; does what it keeps come before
#: the norm; the float32 factor of the stream in the result; where its values begin in `inner`, and
#: its rows in `raw`.
FIELDS = tl.constexpr(18)
(
    NUM_ROWS, START, WIDTH, DOWN, DOWN_BIAS, UP, UP_BIAS, NORM_WEIGHT, NORM_BIAS, TYPE,
    READS, KEEPS, ACTIVATION, NORMALIZES, KEEPS_IN_NORM, RESIDUAL, INNER, RAW,
) = map(tl.constexpr, range(FIELDS))  # fmt: skip
BRANCH, STREAM, NORMED = map(tl.constexpr, (1, 2, 4))
(
    LINEAR, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, QUICK_GELU
) = map(tl.constexpr, range(9))  # fmt: skip


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # which does not overflow
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _activate(x, code):
    if code == RELU:
        x = tl.where(x < 0, 0.0, x)
    elif code == LEAKY_RELU:
        x = tl.where(x < 0, 0.01 * x, x)
    elif code == SILU:
        x = x * _sigmoid(x)
    elif code == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif code == GELU_TANH:
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif code == TANH:
        x = 2.0 * _sigmoid(2.0 * x) - 1.0
    elif code == SIGMOID:
        x = _sigmoid(x)
    elif code == QUICK_GELU:
        x = x * _sigmoid(1.702 * x)
    return x


@triton.jit
def _value(branch, stream, normed, offsets, mask, which):
    """Of a row: the branch's, the stream's, their sum, or the normed sum, as float32."""
    x = tl.where(mask, 0.0, 0.0)
    if (which & BRANCH) != 0:
        x += tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)
    if (which & STREAM) != 0:
        x += tl.load(stream + offsets, mask=mask, other=0.0).to(tl.float32)
    if (which & NORMED) != 0:
        x += tl.load(normed + offsets, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["size"])
def down_kernel(
    branch, stream, normed, parts, items, inner, features, size, epsilon,
    SPLIT: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner[split] of an item's rows and widths.  Grid: items, splits of the features."""
    item = items + tl.program_id(0) * 3
    split = tl.program_id(1)
    part = parts + tl.load(item) * FIELDS
    num_rows = tl.load(part + NUM_ROWS)
    width = tl.load(part + WIDTH)
    which = tl.load(part + READS)
    rows = tl.load(item + 1) + tl.arange(0, ROWS)
    widths = tl.load(item + 2) + tl.arange(0, RANKS)
    down = tl.load(part + DOWN)
    type = tl.load(part + TYPE)
    there = (rows < num_rows)[:, None]
    at = (tl.load(part + START) + rows)[:, None] * features
    mean = tl.zeros([ROWS], tl.float32)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if tl.load(part + NORMALIZES) != 0:
        for k in range(0, features, STEP):
            ks = (k + tl.arange(0, STEP))[None, :]
            mask = there & (ks < features)
            mean += tl.sum(_value(branch, stream, normed, at + ks, mask, which), axis=1)
        mean /= features
        variance = tl.zeros([ROWS], tl.float32)
        for k in range(0, features, STEP):
            ks = (k + tl.arange(0, STEP))[None, :]
            mask = there & (ks < features)
            x = _value(branch, stream, normed, at + ks, mask, which) - mean[:, None]
            variance += tl.sum(tl.where(mask, x * x, 0.0), axis=1)
        factor = 1.0 / tl.sqrt(variance / features + epsilon)
    total = tl.zeros([ROWS, RANKS], tl.float32)
    start = split * SPLIT
    for k in range(start, tl.minimum(start + SPLIT, features), STEP):
        ks = k + tl.arange(0, STEP)
        inside = (ks < features)[None, :]
        mask = there & inside
        x = _value(branch, stream, normed, at + ks[None, :], mask, which)
        x = tl.where(mask, (x - mean[:, None]) * factor[:, None], 0.0)
        weights = _load(
            down, widths[:, None] * features + ks[None, :], (widths < width)[:, None] & inside, type
        )
        total += tl.dot(x, tl.trans(weights), input_precision=PRECISION)
    places = rows[:, None] * width + widths[None, :]
    tl.store(
        inner + split * size + tl.load(part + INNER) + places,
        total,
        mask=there & (widths < width)[None, :],
    )


@triton.jit(do_not_specialize=["size"])
def up_kernel(
    out, branch, stream, normed, parts, blocks, inner, raw, features, size,
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block's rows of the result, or of `raw` where a norm follows.

    Grid: blocks, tiles of `COLUMNS` features.
    """
    block = blocks + tl.program_id(0) * 2
    part = parts + tl.load(block) * FIELDS
    num_rows = tl.load(part + NUM_ROWS)
    width = tl.load(part + WIDTH)
    rows = tl.load(block + 1) + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    there = rows < num_rows
    type = tl.load(part + TYPE)
    code = tl.load(part + ACTIVATION)
    up = tl.load(part + UP)
    down_bias = tl.load(part + DOWN_BIAS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, RANKS):
        widths = start + tl.arange(0, RANKS)
        known = widths < width
        places = inner + tl.load(part + INNER) + rows[:, None] * width + widths[None, :]
        mask = there[:, None] & known[None, :]
        x = tl.load(places, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            x += tl.load(places + split * size, mask=mask, other=0.0)
        x = _activate(x + _load(down_bias, widths, known, type)[None, :], code)
        weights = _load(
            up, columns[:, None] * width + widths[None, :], inside[:, None] & known[None, :], type
        )
        total += tl.dot(x, tl.trans(weights), input_precision=PRECISION)
    total += _load(tl.load(part + UP_BIAS), columns, inside, type)[None, :]
    offsets = (tl.load(part + START) + rows)[:, None] * features + columns[None, :]
    mask = there[:, None] & inside[None, :]
    kept = _value(branch, stream, normed, offsets, mask, tl.load(part + KEEPS))
    if tl.load(part + NORM_WEIGHT) != 0:
        if tl.load(part + KEEPS_IN_NORM) != 0:
            total += kept
        offsets = (tl.load(part + RAW) + rows)[:, None] * features + columns[None, :]
        tl.store(raw + offsets, total, mask=mask)
    else:
        total += kept
        residual = _float(tl.load(part + RESIDUAL))
        if residual != 0.0:
            total += residual * _value(branch, stream, normed, offsets, mask, STREAM)
        tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(
    out, branch, stream, normed, parts, blocks, raw, features, epsilon, STEP: tl.constexpr
):
    """A block's rows of the result from `raw`.  Grid: the blocks of parts with a norm."""
    block = blocks + tl.program_id(0) * 2
    part = parts + tl.load(block) * FIELDS
    rows = tl.load(block + 1) + tl.arange(0, ROWS)
    there = (rows < tl.load(part + NUM_ROWS))[:, None]
    at = (tl.load(part + RAW) + rows)[:, None] * features
    to = (tl.load(part + START) + rows)[:, None] * features
    mean = tl.zeros([ROWS], tl.float32)
    for k in range(0, features, STEP):
        ks = (k + tl.arange(0, STEP))[None, :]
        mean += tl.sum(tl.load(raw + at + ks, mask=there & (ks < features), other=0.0), axis=1)
    mean /= features
    variance = tl.zeros([ROWS], tl.float32)
    for k in range(0, features, STEP):
        ks = (k + tl.arange(0, STEP))[None, :]
        mask = there & (ks < features)
        x = tl.load(raw + at + ks, mask=mask, other=0.0) - mean[:, None]
        variance += tl.sum(tl.where(mask, x * x, 0.0), axis=1)
    factor = 1.0 / tl.sqrt(variance / features + epsilon)
    type = tl.load(part + TYPE)
    keeps = tl.where(tl.load(part + KEEPS_IN_NORM) != 0, 0, tl.load(part + KEEPS))
    residual = _float(tl.load(part + RESIDUAL))
    for k in range(0, features, STEP):
        ks = k + tl.arange(0, STEP)
        inside = ks < features
        mask = there & inside[None, :]
        x = tl.load(raw + at + ks[None, :], mask=mask, other=0.0)
        x = (x - mean[:, None]) * factor[:, None]
        x = x * _load(tl.load(part + NORM_WEIGHT), ks, inside, type)[None, :]
        x += _load(tl.load(part + NORM_BIAS), ks, inside, type)[None, :]
        x += _value(branch, stream, normed, to + ks[None, :], mask, keeps)
        if residual != 0.0:
            x += residual * _value(branch, stream, normed, to + ks[None, :], mask, STREAM)
        tl.store(out + to + ks[None, :], x.to(out.dtype.element_ty), mask=mask)
