"""Plain implementations, row by row in float64: the oracle of every faster one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.ops.segments import BlocksPart, LowRankPart, MapPart, RowsPart, VectorPart


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


def rotate_(x: Tensor, parts: Sequence[BlocksPart]) -> None:
    """Semantics: x[i] = x[i] R with R = diag(blocks), for the parts in their order.

    Orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280).

    Args:
        x: `[rows, num_blocks · b]`, changed in place.
    """
    for part in parts:
        rotation = torch.block_diag(*part.blocks.double())
        for i in range(part.start, part.end):
            x[i] = (x[i].double() @ rotation).to(x.dtype)


def set_linear_(y: Tensor, x: Tensor, parts: Sequence[MapPart]) -> None:
    """Semantics: y[i] = W x[i] + b for the part holding row i; the last where several do.

    Args:
        y: `[rows, out]`, changed in place.
        x: `[rows, in]`.
    """
    for part in parts:
        for i in range(part.start, part.end):
            row = part.weight.double() @ x[i].double()
            y[i] = (row if part.bias is None else row + part.bias.double()).to(y.dtype)


def set_columns_(y: Tensor, x: Tensor, parts: Sequence[RowsPart], bias: Tensor | None) -> None:
    """Semantics: y[i, ids[j]] = rows[j] · x[i] + bias[ids[j]] for the part holding row i.

    Args:
        y: `[rows, out]`, changed in place.
        x: `[rows, in]`.
        parts: `scale` does not count.
        bias: `[out]`, or None for 0.
    """
    for part in parts:
        for i in range(part.start, part.end):
            for id_, row in zip(part.ids.tolist(), part.rows, strict=True):
                value = row.double() @ x[i].double()
                y[i, id_] = value if bias is None else value + bias[id_].double()


def add_low_rank_of_ids_(y: Tensor, token_ids: Tensor, parts: Sequence[LowRankPart]) -> None:
    """Semantics: y[i] += Σ over the parts holding row i of scale · Aᵀ[token_ids[i]] Bᵀ.

    Args:
        y: `[rows, dim]`, changed in place.
        token_ids: `[rows]` int64.
        parts: a_t `[num_embeddings, rank]`, b_t `[rank, dim]`.
    """
    one_hot = torch.zeros(len(y), max((len(p.a_t) for p in parts), default=0), dtype=torch.float64)
    for part in parts:
        for i in range(part.start, part.end):
            one_hot[i, token_ids[i]] = 1
    add_low_rank_(y, one_hot, parts)


def set_rows_of_ids_(y: Tensor, token_ids: Tensor, parts: Sequence[RowsPart]) -> None:
    """Semantics: y[i] = scale · rows[j] where token_ids[i] = ids[j], for the part holding row i.

    Args:
        y: `[rows, dim]`, changed in place.
        token_ids: `[rows]` int64.
    """
    for part in parts:
        rows = dict(zip(part.ids.tolist(), part.rows, strict=True))
        for i in range(part.start, part.end):
            row = rows.get(int(token_ids[i]))
            if row is not None:
                y[i] = (part.scale * row.double()).to(y.dtype)
