"""Trained adapters' updates and output scales in Triton, forward and backward.

All parts at a module go in two launches forward and in five backward, however many there are, or in
three more where a part has so many rows that its sums are made in chunks. A part's rows are cut
into blocks and its ranks into groups, at its own rank; each program computes one tile of one part,
so that no part's numbers reach another's, and a part's are the same to the bit whatever is trained
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcore.ops.triton.tables import block_of
from peftcore.ops.triton.trained_kernels import (
    RANKS,
    expand_kernel,
    outer_kernel,
    outer_sum_kernel,
    scale_back_kernel,
    scale_sum_kernel,
    shrink_kernel,
)
from peftcore.ops.triton.trained_tables import Given, Parts, Spans

#: Features of one program of a shrink: a wider module's are split.
_SPLIT = 1024
#: Features of a step of a shrink, and of one program of the others, at most.
_STEP = 128
_COLUMNS = 128
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def adapt_(y: Tensor, x: Tensor, width: int, spans: Spans, given: Given) -> list[Tensor]:
    """See `peftcore.ops.Kernels`.  Returns low and before, of all parts together."""
    parts = Parts(y, x, width, spans, given)
    launch = _Launch(parts, y)
    low, before = launch.new_low(width), y.new_empty(parts.num_before, parts.out)
    launch.shrink(low, back=False)
    launch.expand(low, before, back=False)
    return [low, before]


def adapt_back_(
    grad: Tensor,
    x: Tensor | None,
    width: int,
    spans: Spans,
    given: Given,
    kept: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_x: Tensor | None,
) -> list[Tensor | None]:
    """See `peftcore.ops.Kernels`."""
    low, before = kept
    parts = Parts(grad, x, width, spans, given)
    grads = [
        torch.empty_like(t) if t is not None and needed else None
        for t, needed in zip(given, wanted, strict=True)
    ]
    for own in grads[3::4]:
        if own is not None:
            own.zero_()
    parts.want(grads, grad_x)
    launch = _Launch(parts, grad)
    grad_low = launch.new_low(parts.out)
    launch.scale_back(before)
    launch.shrink(grad_low, back=True)
    launch.outer(low, of_b=True)
    launch.outer(grad_low, of_b=False)
    launch.expand(grad_low, before, back=True)
    return grads


class _Launch:
    """Launches of the kernels over the parts at a module; y: the result or its gradient."""

    def __init__(self, parts: Parts, y: Tensor) -> None:
        self._parts, self._work, self._y = parts, parts.work, y
        self._table = parts.on_device()
        self._options: dict[str, Any] = {"TYPE": _TYPES[y.dtype], "ALIGNED": parts.aligned}
        # Halves are exact in tf32; float32 factors beside them are not.
        self._precision = "ieee" if y.dtype == torch.float32 else "tf32"

    def new_low(self, features: int) -> Tensor:
        """What a shrink of so many features fills: `[splits, values]`."""
        splits = triton.cdiv(features, _SPLIT)
        return self._y.new_empty(splits, self._parts.num_low, dtype=torch.float32)

    def shrink(self, low: Tensor, back: bool) -> None:
        features = self._parts.out if back else self._parts.width
        if len(self._work.items):
            shrink_kernel[(len(self._work.items), len(low))](
                self._table, self._work.items, low, features, low.shape[1],
                BACK=back, SPLIT=_SPLIT, STEP=block_of(features, _STEP),
                PRECISION=self._precision, **self._options,
            )  # fmt: skip

    def expand(self, low: Tensor, before: Tensor, back: bool) -> None:
        if back and not self._parts.reaches_x:
            return
        features = self._parts.width if back else self._parts.out
        columns = block_of(features, _COLUMNS)
        if len(self._work.blocks):
            expand_kernel[(len(self._work.blocks), triton.cdiv(features, columns))](
                self._table, self._work.blocks, low, before, features, low.shape[1],
                BACK=back, SPLITS=len(low), COLUMNS=columns,
                PRECISION=self._precision, **self._options,
            )  # fmt: skip

    def outer(self, low: Tensor, of_b: bool) -> None:
        features = self._parts.out if of_b else self._parts.width
        columns = block_of(features, _COLUMNS)
        tiles = triton.cdiv(features, columns)
        groups, sums = self._work.groups, self._work.group_sums
        if not len(groups):
            return
        slots = self._new_slots(len(groups) if len(sums) else 0, RANKS.value * features)
        outer_kernel[(len(groups), tiles)](
            self._table, groups, low, slots, features, low.shape[1],
            OF_B=of_b, SPLITS=len(low), COLUMNS=columns,
            PRECISION=self._precision, **self._options,
        )  # fmt: skip
        if len(sums):
            outer_sum_kernel[(len(sums), tiles)](
                self._table, sums, slots, features,
                OF_B=of_b, COLUMNS=columns, ALIGNED=self._options["ALIGNED"],
            )  # fmt: skip

    def scale_back(self, before: Tensor) -> None:
        features = self._parts.out
        columns = block_of(features, _COLUMNS)
        tiles = triton.cdiv(features, columns)
        chunks, sums = self._work.scaled, self._work.scaled_sums
        if not len(chunks):
            return
        slots = self._new_slots(len(chunks) if len(sums) else 0, features)
        scale_back_kernel[(len(chunks), tiles)](
            self._table, chunks, before, slots, features, COLUMNS=columns, **self._options
        )
        if len(sums):
            scale_sum_kernel[(len(sums), tiles)](
                self._table, sums, slots, features,
                COLUMNS=columns, ALIGNED=self._options["ALIGNED"],
            )  # fmt: skip

    def _new_slots(self, count: int, size: int) -> Tensor:
        return self._y.new_empty(count, size, dtype=torch.float32)
