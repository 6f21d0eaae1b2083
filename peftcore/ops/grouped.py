"""Segmented operations by torch: one pair of matmuls a segment, at its true rank.

Semantics and arguments as in `reference`. Rows of the base are in no segment and cost nothing.
Segmented grouped matmul for adapters: Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA
(Sheng et al. 2023, arXiv:2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.ops.segments import BlocksPart, LowRankPart, MapPart, RowsPart, VectorPart


def add_low_rank_(y: Tensor, x: Tensor, parts: Sequence[LowRankPart]) -> None:
    for start, end, a_t, b_t, scale in parts:
        y[start:end].addmm_(x[start:end].mm(a_t.to(x.dtype)), b_t.to(y.dtype), alpha=scale)


def scale_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    for start, end, v, _ in parts:
        x[start:end].mul_(v)


def add_(x: Tensor, parts: Sequence[VectorPart]) -> None:
    for start, end, v, weight in parts:
        x[start:end].add_(v, alpha=weight)


def rotate_(x: Tensor, parts: Sequence[BlocksPart]) -> None:
    for start, end, blocks in parts:
        pieces = x[start:end].unflatten(1, blocks.shape[:2]).to(blocks.dtype)
        x[start:end] = torch.einsum("rnk,nkc->rnc", pieces, blocks).flatten(1)


def set_linear_(y: Tensor, x: Tensor, parts: Sequence[MapPart]) -> None:
    for start, end, weight, bias in parts:
        y[start:end] = F.linear(x[start:end].to(weight.dtype), weight, bias)


def set_columns_(y: Tensor, x: Tensor, parts: Sequence[RowsPart], bias: Tensor | None) -> None:
    for start, end, ids, rows, _ in parts:
        values = F.linear(x[start:end].to(rows.dtype), rows).to(y.dtype)
        if bias is not None:
            values += bias[ids]
        y[start:end].index_copy_(1, ids, values)


def add_low_rank_of_ids_(y: Tensor, token_ids: Tensor, parts: Sequence[LowRankPart]) -> None:
    for start, end, a_t, b_t, scale in parts:
        shrunk = a_t[token_ids[start:end]]
        y[start:end].addmm_(shrunk.to(y.dtype), b_t.to(y.dtype), alpha=scale)


def set_rows_of_ids_(y: Tensor, token_ids: Tensor, parts: Sequence[RowsPart]) -> None:
    # By search and `where`: no result's shape depends on values, which a GPU would wait for.
    for start, end, ids, rows, scale in parts:
        tokens = token_ids[start:end]
        ordered, order = ids.sort()
        place = torch.searchsorted(ordered, tokens).clamp_(max=len(ids) - 1)
        found = (ordered[place] == tokens)[:, None]
        y[start:end] = torch.where(found, (rows[order[place]] * scale).to(y.dtype), y[start:end])
