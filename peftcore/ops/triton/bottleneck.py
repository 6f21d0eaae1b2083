"""Bottlenecks on the rows of a residual branch in Triton, without gradients.

All that act at a module go in two launches, whatever their number, widths and kinds; in three where
one has a norm after it. Knows nothing of models: `ops.bottleneck` says what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from torch import Tensor

from peftcore.ops.triton import bottleneck_kernels as k
from peftcore.ops.triton.bottleneck_kernels import down_kernel, norm_kernel, up_kernel
from peftcore.ops.triton.tables import ROWS, TYPES, block_of, cut, starts_of, to_device
from peftcore.primitives import Bottleneck, BranchValue, tensors_of

#: Activations by AdapterHub's names; the rest is torch's.
ACTIVATIONS: dict[str, int] = {
    "linear": k.LINEAR.value,
    "relu": k.RELU.value,
    "leakyrelu": k.LEAKY_RELU.value,
    "leaky_relu": k.LEAKY_RELU.value,
    "silu": k.SILU.value,
    "swish": k.SILU.value,
    "gelu": k.GELU.value,
    "gelu_python": k.GELU.value,
    "gelu_new": k.GELU_TANH.value,
    "gelu_fast": k.GELU_TANH.value,
    "gelu_accurate": k.GELU_TANH.value,
    "gelu_pytorch_tanh": k.GELU_TANH.value,
    "gelu_python_tanh": k.GELU_TANH.value,
    "tanh": k.TANH.value,
    "sigmoid": k.SIGMOID.value,
    "quick_gelu": k.QUICK_GELU.value,
}
_VALUES: dict[BranchValue, int] = {
    "branch": k.BRANCH.value,
    "stream": k.STREAM.value,
    "sum": k.BRANCH.value | k.STREAM.value,
    "normed": k.NORMED.value,
}
#: Inputs of one program of `down`: a wider module's are split.
_SPLIT = 1024
#: Features of a step, and of one program of `up`, at most.
_STEP = 128


class Segment(NamedTuple):
    """Rows [start, end) get `transform`'s result, plus `residual` times the stream."""

    start: int
    end: int
    weights: Bottleneck
    residual: float


def knows(p: Bottleneck) -> bool:
    """Can `bottlenecks_` compute it?"""
    return _row(p) is not None


def bottlenecks_(
    out: Tensor,
    branch: Tensor,
    stream: Tensor | None,
    normed: Tensor | None,
    segments: Sequence[Segment],
    epsilon: float,
) -> None:
    """Write the segments' rows of `out`.

    Args:
        out, branch, stream, normed: `[rows, d]`, contiguous; the last two None where no segment
            reads them. `out` is none of the others.
        segments: disjoint, of what `knows`.
        epsilon: of the norms.

    Raises:
        ValueError: for what the kernels would misread.
    """
    if not segments:
        return
    num_features = out.shape[1]
    rows = _rows_of(out, branch, stream, normed, segments)
    has_norm = rows[:, k.NORM_WEIGHT] != 0
    num_rows, widths = rows[:, k.NUM_ROWS], rows[:, k.WIDTH]
    num_inner, num_raw = num_rows * widths, num_rows * has_norm
    rows[:, k.INNER], rows[:, k.RAW] = starts_of(num_inner), starts_of(num_raw)
    work = _work(*(tuple(n.tolist()) for n in (num_rows, widths, has_norm)), out.device)
    if not len(work.blocks):
        return

    values = (branch, branch if stream is None else stream, branch if normed is None else normed)
    parts = to_device(rows, out.device)
    size = int(num_inner.sum())
    inner = out.new_empty(triton.cdiv(num_features, _SPLIT), size, dtype=torch.float32)
    raw = out.new_empty(int(num_raw.sum()), num_features, dtype=torch.float32)
    step = block_of(num_features, _STEP)
    precision = "ieee" if out.dtype == torch.float32 else "tf32"
    down_kernel[(len(work.items), len(inner))](
        *values, parts, work.items, inner, num_features, size, epsilon,
        SPLIT=_SPLIT, STEP=step, PRECISION=precision,
    )  # fmt: skip
    up_kernel[(len(work.blocks), triton.cdiv(num_features, step))](
        out, *values, parts, work.blocks, inner, raw, num_features, size,
        SPLITS=len(inner), COLUMNS=step, PRECISION=precision,
    )  # fmt: skip
    if len(work.normed):
        norm_kernel[(len(work.normed),)](
            out, *values, parts, work.normed, raw, num_features, epsilon, STEP=step
        )


def _rows_of(
    out: Tensor,
    branch: Tensor,
    stream: Tensor | None,
    normed: Tensor | None,
    segments: Sequence[Segment],
) -> np.ndarray:
    """`[segments, FIELDS]` but for `INNER` and `RAW`, after the checks."""
    for x in (branch, stream, normed):
        if x is not None and (x.shape != out.shape or x.device != out.device):
            raise ValueError(f"{tuple(x.shape)} beside {tuple(out.shape)}")
        if not (x is None or x.is_contiguous()) or not out.is_contiguous():
            raise ValueError("rows are not contiguous")
    if any(s.weights.up.shape[0] != out.shape[1] for s in segments):
        raise ValueError(f"bottlenecks of another width than {out.shape[1]}")
    starts, ends = (np.array([s[i] for s in segments], np.int64) for i in (0, 1))
    if (starts < 0).any() or (ends < starts).any() or (ends > len(out)).any():
        raise ValueError(f"segments beyond {len(out)} rows")
    found = [row for s in segments if (row := _row(s.weights)) is not None]
    if len(found) < len(segments):
        raise ValueError("a bottleneck that the kernels do not know")
    rows = np.stack(found)
    residual = np.array([s.residual for s in segments], np.float32)
    needed = int(np.bitwise_or.reduce(rows[:, k.READS] | rows[:, k.KEEPS]))
    needs_stream = needed & k.STREAM.value or residual.any()
    if (needs_stream and stream is None) or (needed & k.NORMED.value and normed is None):
        raise ValueError("a segment reads what is not given")
    rows[:, k.NUM_ROWS], rows[:, k.START] = ends - starts, starts
    rows[:, k.RESIDUAL] = residual.view(np.int32)
    return rows


class _Work(NamedTuple):
    """blocks, items: as `cut` gives them; normed: the blocks of parts with a norm after."""

    blocks: Tensor
    items: Tensor
    normed: Tensor


@lru_cache(maxsize=64)
def _work(
    num_rows: tuple[int, ...],
    widths: tuple[int, ...],
    has_norm: tuple[bool, ...],
    device: torch.device,
) -> _Work:
    blocks, items = cut(np.array(num_rows, np.int64), np.array(widths, np.int64), ROWS)
    normed = blocks[np.array(has_norm, bool)[blocks[:, 0]]]
    return _Work(*(to_device(list_, device) for list_ in (blocks, items, normed)))


#: Rows of the table, as far as the weights say them, which does not change; None for what the
#: kernels do not know.
_rows: WeakKeyDictionary[Bottleneck, np.ndarray | None] = WeakKeyDictionary()


def _row(p: Bottleneck) -> np.ndarray | None:
    if p not in _rows:
        _rows[p] = _new_row(p)
    return _rows[p]


def _new_row(p: Bottleneck) -> np.ndarray | None:
    tensors = tensors_of(p)
    dtype = p.down.dtype
    uniform = all(t.dtype == dtype and t.is_contiguous() for t in tensors)
    if p.activation not in ACTIVATIONS or dtype not in TYPES or not uniform:
        return None
    row = np.zeros(k.FIELDS.value, np.int64)
    row[k.WIDTH], row[k.TYPE] = len(p.down), TYPES[dtype]
    for field, tensor in (
        (k.DOWN, p.down),
        (k.DOWN_BIAS, p.down_bias),
        (k.UP, p.up),
        (k.UP_BIAS, p.up_bias),
        (k.NORM_WEIGHT, p.norm_weight),
        (k.NORM_BIAS, p.norm_bias),
    ):
        row[field] = 0 if tensor is None else tensor.data_ptr()
    row[k.READS], row[k.KEEPS] = _VALUES[p.reads], _VALUES[p.keeps]
    row[k.ACTIVATION] = ACTIVATIONS[p.activation]
    row[k.NORMALIZES], row[k.KEEPS_IN_NORM] = p.normalizes, p.keeps_in_norm
    return row
