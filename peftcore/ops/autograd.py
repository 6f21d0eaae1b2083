"""Segmented operations with gradients: forward and backward over the same segments.

Semantics as the operations of the same names in `reference`; the first argument's memory is
reused. Rows in no segment cost nothing in either direction, and where no two segments overlap
neither does the order of the segments matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcore.ops.segments import LowRankPart, VectorPart


def add_low_rank(
    y: Tensor,
    x: Tensor,
    parts: Sequence[LowRankPart],
    inputs: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """y[i] + Σ over the parts holding row i of scale · (x[i] Aᵀ) Bᵀ.

    Args:
        y: `[rows, out]`, overwritten: the result of a module that does not need it any more.
        x: `[rows, in]`.
        parts: ranges, Aᵀ `[in, rank]`, Bᵀ `[rank, out]`; gradients flow to x, A and B.
        inputs: for a part its own rows `[end − start, in]` in the place of x's (after dropout).
    """
    spans = tuple((p.start, p.end, p.scale) for p in parts)
    factors = [t for p in parts for t in (p.a_t, p.b_t)]
    own = inputs if inputs is not None else [None] * len(parts)
    with torch.autocast(y.device.type, enabled=False):  # the factors compute in their own dtype
        return _AddLowRank.apply(y, x, spans, *factors, *own)


def scale(x: Tensor, parts: Sequence[VectorPart]) -> Tensor:
    """x[i] ⊙ v for the part holding row i; gradients flow to x and v.

    Args:
        x: `[rows, features]`, overwritten.
        parts: disjoint ranges; `weight` does not count.
    """
    spans = tuple((p.start, p.end) for p in parts)
    if not torch.is_grad_enabled():
        for (start, end), part in zip(spans, parts, strict=True):
            x[start:end].mul_(part.v)
        return x
    return _Scale.apply(x, spans, *(p.v for p in parts))


def add(x: Tensor, parts: Sequence[VectorPart]) -> Tensor:
    """x[i] + Σ over the parts holding row i of v; gradients flow to x and v.

    Args:
        x: `[rows, features]`, overwritten.
        parts: `weight` does not count.
    """
    spans = tuple((p.start, p.end) for p in parts)
    return _Add.apply(x, spans, *(p.v for p in parts))


class _AddLowRank(torch.autograd.Function):
    """Saves x, the parts' own inputs, the factors and the shrunk rows x Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        spans: tuple[tuple[int, int, float], ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        count = len(spans)
        own = tensors[2 * count :]
        shrunk = []
        for i, (start, end, factor) in enumerate(spans):
            a_t, b_t, rows = tensors[2 * i], tensors[2 * i + 1], own[i]
            assert a_t is not None
            assert b_t is not None
            if rows is None:
                rows = x[start:end]
            low = rows.to(a_t.dtype) @ a_t
            if y.dtype == b_t.dtype:
                y[start:end].addmm_(low, b_t, alpha=factor)
            else:
                y[start:end] += (low @ b_t).mul_(factor).to(y.dtype)
            shrunk.append(low)
        ctx.mark_dirty(y)
        ctx.spans = spans
        ctx.save_for_backward(None if all(r is not None for r in own) else x, *tensors, *shrunk)
        ctx.width, ctx.dtype = x.shape[1], x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        spans, count = ctx.spans, len(ctx.spans)
        factors, own, shrunk = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        grad_factors: list[Tensor | None] = []
        grad_own: list[Tensor | None] = []
        reach_x: list[tuple[int, int, Tensor, Tensor]] = []
        for i, (start, end, factor) in enumerate(spans):
            a_t, b_t = factors[2 * i], factors[2 * i + 1]
            grad = grad_y[start:end].to(b_t.dtype)
            grad_low = (grad @ b_t.t()).mul_(factor)
            rows = x[start:end] if own[i] is None else own[i]
            grad_factors += [
                rows.to(a_t.dtype).t() @ grad_low if needs[2 * i] else None,
                (shrunk[i].t() @ grad).mul_(factor) if needs[2 * i + 1] else None,
            ]
            grad_own.append(None)
            if own[i] is None:
                reach_x.append((start, end, grad_low, a_t))
            elif needs[2 * count + i]:
                grad_own[i] = (grad_low @ a_t.t()).to(rows.dtype)
        grad_x = None
        if needs_x and reach_x:
            shape = (len(grad_y), ctx.width)
            grad_x = _products(reach_x, grad_y.new_empty(shape, dtype=ctx.dtype))
        return grad_y, grad_x, None, *grad_factors, *grad_own


def _products(work: list[tuple[int, int, Tensor, Tensor]], out: Tensor) -> Tensor:
    """Fill `out`: Σ low A in the rows [start, end) of each, 0 in others."""
    done = 0
    for start, end, low, a_t in sorted(work, key=lambda w: w[:2]):
        low = low.to(a_t.dtype)
        if start >= done:
            out[done:start].zero_()
            if out.dtype == a_t.dtype:
                torch.mm(low, a_t.t(), out=out[start:end])
            else:
                out[start:end] = low @ a_t.t()
            done = end
        else:
            if end > done:
                out[done:end].zero_()
                done = end
            out[start:end] += (low @ a_t.t()).to(out.dtype)
    out[done:].zero_()
    return out


class _Scale(torch.autograd.Function):
    """Saves the segments' rows as they were, and the vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: tuple[tuple[int, int], ...], *vs: Tensor) -> Tensor:
        before = []
        for (start, end), v in zip(spans, vs, strict=True):
            rows = x[start:end]
            before.append(rows.clone() if v.requires_grad else None)
            rows.mul_(v)
        ctx.mark_dirty(x)
        ctx.spans = spans
        ctx.save_for_backward(*vs, *before)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        count = len(ctx.spans)
        saved = ctx.saved_tensors  # once: under checkpointing it cannot be asked for again
        vs, before = saved[:count], saved[count:]
        grad_x = grad.clone() if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for (start, end), v, rows in zip(ctx.spans, vs, before, strict=True):
            upstream = grad[start:end]
            grads.append(
                None if rows is None else (upstream.to(v.dtype) * rows.to(v.dtype)).sum(dim=0)
            )
            if grad_x is not None:
                torch.mul(upstream, v, out=grad_x[start:end])
        return grad_x, None, *grads


class _Add(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: tuple[tuple[int, int], ...], *vs: Tensor) -> Tensor:
        for (start, end), v in zip(spans, vs, strict=True):
            x[start:end] += v
        ctx.mark_dirty(x)
        ctx.spans = spans
        ctx.dtypes = [v.dtype for v in vs]
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [
            grad[start:end].sum(dim=0, dtype=dtype) if needed else None
            for (start, end), dtype, needed in zip(
                ctx.spans, ctx.dtypes, ctx.needs_input_grad[2:], strict=True
            )
        ]
        return grad, None, *grads
