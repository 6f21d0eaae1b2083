"""Which rows an operation touches, and with what."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LowRankPart(NamedTuple):
    """Rows [start, end) get scale · (x Aᵀ) Bᵀ.  a_t: `[in, rank]`, b_t: `[rank, out]`."""

    start: int
    end: int
    a_t: Tensor
    b_t: Tensor
    scale: float


class VectorPart(NamedTuple):
    """Rows [start, end) meet `v`, `[features]`, times `weight` where it is added."""

    start: int
    end: int
    v: Tensor
    weight: float = 1.0
