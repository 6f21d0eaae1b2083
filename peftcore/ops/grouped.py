"""Segmented operations by torch: one pair of matmuls a segment, at its true rank.

Semantics and arguments as in `reference`. Rows of the base are in no segment and cost nothing.
Segmented grouped matmul for adapters: Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA
(Sheng et al. 2023, arXiv:2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftcore.ops.segments import LowRankPart, VectorPart


def add_low_rank_(y: Tensor, x: Tensor, parts: Sequence[LowRankPart]) -> None:
    for start, end, a_t, b_t, scale in parts:
        y[start:end].addmm_(
            x[start:end].to(a_t.dtype).mm(a_t).to(y.dtype), b_t.to(y.dtype), alpha=scale
        )


def scale_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    for start, end, v, _ in parts:
        x[start:end].mul_(v)


def add_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    for start, end, v, weight in parts:
        x[start:end].add_(v, alpha=weight)
