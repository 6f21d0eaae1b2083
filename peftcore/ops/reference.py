"""Plain implementations, row by row in float64: the oracle of every faster one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.ops.segments import LowRankPart, VectorPart


def add_low_rank_(y: Tensor, x: Tensor, parts: Sequence[LowRankPart]) -> None:
    """Semantics: y[i] += Σ over the parts holding row i of scale · (x[i] Aᵀ) Bᵀ.

    Args:
        y: `[rows, out]`, changed in place.
        x: `[rows, in]`.
        parts: their row ranges may overlap; each has a rank of its own.
    """
    delta = torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    for part in parts:
        for i in range(part.start, part.end):
            shrunk = x[i].double() @ part.a_t.double()
            delta[i] += part.scale * (shrunk @ part.b_t.double())
    y.copy_(y.double() + delta)


def scale_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    """Semantics: x[i] *= v for every part holding row i.  x: `[rows, features]`, in place."""
    for part in parts:
        for i in range(part.start, part.end):
            x[i] = (x[i].double() * part.v.double()).to(x.dtype)


def add_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    """Semantics: x[i] += weight · v for every part holding row i.  x: `[rows, features]`."""
    for part in parts:
        for i in range(part.start, part.end):
            x[i] = (x[i].double() + part.weight * part.v.double()).to(x.dtype)
