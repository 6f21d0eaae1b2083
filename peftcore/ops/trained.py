"""What trained adapters do at linear modules: updates and output scales, with gradients.

The kernels that `ops.select` gives compute all parts at a module together, forward and backward; on
a CPU, over a layer of `quant`, the base's map lies in the same node. Where there are none, and for
what they do not know, the operations of `autograd` compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftcore.ops import Kernels, select, uses_triton
from peftcore.ops.autograd import add_low_rank, scale
from peftcore.ops.cpu import kernels
from peftcore.ops.segments import LowRankPart, VectorPart
from peftcore.quant.linear import QuantLinear, training_dtype


class TrainedPart(NamedTuple):
    """What one adapter does to rows [start, end) of a module's output y of x.

    Semantics: y[i] += scale · B (A x[i]), then y[i] *= v.

    Attributes:
        a: `[rank, in]`, b: `[out, rank]`; both or neither.
        v: `[out]`, or None.
        own: `[end − start, in]`, in the place of x's rows (after dropout).
    """

    start: int
    end: int
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    v: Tensor | None = None
    own: Tensor | None = None


def adapted(base: nn.Module, x: Tensor, parts: Sequence[TrainedPart]) -> Tensor:
    """The base's map of x with the parts on top; gradients flow to x and to what the parts hold.

    Args:
        base: a linear module, frozen.
        x: `[rows, in]`.
        parts: where they share rows the updates come before all scales.

    Returns: `[rows, out]`, in fresh memory.
    """
    ordered = sorted(parts, key=lambda part: part.start)
    ops = select(x.device)
    if ops is None or not _kernels_know(x, ordered):
        return plain(base(x), x, parts)
    spans = [(part.start, part.end, part.scale) for part in ordered]
    tensors = [t for part in ordered for t in (part.a, part.b, part.v, part.own)]
    if isinstance(base, QuantLinear) and x.is_cpu:
        y: Tensor = _Adapted.apply(ops, None, x, base, spans, *tensors)
        return y
    y = base(x)
    if y.dtype != x.dtype or not y.is_contiguous():
        return plain(y, x, parts)
    y = _Adapted.apply(ops, y, x, None, spans, *tensors)
    return y


def plain(y: Tensor, x: Tensor, parts: Sequence[TrainedPart]) -> Tensor:
    """As `adapted`, by torch.  y: the base's result, overwritten."""
    updates: list[LowRankPart] = []
    inputs: list[Tensor | None] = []
    for part in parts:
        if part.a is not None:
            assert part.b is not None
            a_t, b_t = part.a.t(), part.b.t()
            updates.append(LowRankPart(part.start, part.end, a_t, b_t, part.scale))
            inputs.append(part.own)
    if updates:
        y = add_low_rank(y, x, updates, inputs)
    scales = [VectorPart(p.start, p.end, p.v) for p in parts if p.v is not None]
    for group in [scales] if _disjoint(scales) else [[one] for one in scales]:
        if group:
            y = scale(y, group)
    return y


def row_norms(a: Tensor, b: Tensor, across: Tensor, squares: Tensor, scale: float) -> Tensor:
    """‖W + scale · B A‖ of each row, `[out]`, without gradients.

    Semantics: the root of ‖Wᵢ‖² + 2 scale Bᵢ · A Wᵢᵀ + scale² Bᵢ A Aᵀ Bᵢᵀ (section 4.3 of the DoRA
    paper, arXiv:2402.09353): W itself is not read.

    Args:
        a: `[rank, in]`, b: `[out, rank]`.
        across: A Wᵀ, `[rank, out]`.
        squares: ‖W‖² of each row, `[out]`.
    """
    given = (a, b, across, squares)
    cpu = kernels()
    is_chosen = cpu is not None and select(a.device) is cpu
    if is_chosen and all(t.dtype == torch.float32 for t in given):
        norms: Tensor = cpu.row_norms(*(t.detach().contiguous() for t in given), scale)
        return norms
    return plain_row_norms(a, b, across, squares, scale)


@torch.no_grad()
def plain_row_norms(a: Tensor, b: Tensor, across: Tensor, squares: Tensor, scale: float) -> Tensor:
    """As `row_norms`, by torch."""
    mixed = (b * across.t()).sum(dim=1)
    own = ((b @ (a @ a.t())) * b).sum(dim=1)
    return (squares + 2 * scale * mixed + scale**2 * own).clamp_(min=0).sqrt_()


def _disjoint(parts: Sequence[TrainedPart] | Sequence[VectorPart]) -> bool:
    spans = sorted((part.start, part.end) for part in parts)
    return all(one[1] <= other[0] for one, other in pairwise(spans))


def _kernels_know(x: Tensor, parts: Sequence[TrainedPart]) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) and not (
        x.dtype == torch.float16 and uses_triton(x.device)
    ):
        return False
    if torch.is_autocast_enabled(x.device.type) or not _disjoint(parts):
        return False
    return all(
        (part.own is None or part.own.dtype == x.dtype)
        and all(t is None or t.dtype == torch.float32 for t in (part.a, part.b, part.v))
        for part in parts
    )


class _Adapted(torch.autograd.Function):
    """Saves x, the parts' tensors, and what the kernels keep: the shrunk rows A x, and the rows
    before a scale.

    The base's map is in the node where `layer` is given in the place of its result y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: Kernels,
        y: Tensor | None,
        x: Tensor,
        layer: QuantLinear | None,
        spans: list[tuple[int, int, float]],
        *tensors: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        given = [None if t is None else t.contiguous() for t in tensors]
        if y is not None:
            ctx.mark_dirty(y)
        else:
            assert layer is not None
            dtype = training_dtype(x) if ctx.needs_input_grad[2] else torch.float32
            y = layer.multiply(x, dtype)
        kept = ops.adapt_(y, x, x.shape[1], spans, given)
        reads_x = any(
            a is not None and own is None for a, own in zip(given[::4], given[3::4], strict=True)
        )
        ctx.save_for_backward(x if reads_x else None, *given, *kept)
        ctx.ops, ctx.layer, ctx.spans, ctx.x_like = ops, layer, spans, (x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        count, layer = 4 * len(ctx.spans), ctx.layer
        given, kept = rest[:count], rest[count:]
        _, needs_y, needs_x, _, _, *wanted = ctx.needs_input_grad
        if any(v is not None for v in given[2::4]):  # what the kernels will write into
            grad = grad.clone(memory_format=torch.contiguous_format)
        grad = grad.contiguous()
        shape, dtype = ctx.x_like
        grad_x = grad.new_zeros(shape, dtype=dtype) if needs_x else None
        grads = ctx.ops.adapt_back_(grad, x, shape[1], ctx.spans, given, kept, wanted, grad_x)
        if layer is not None and grad_x is not None:
            grad_x = layer.multiply_back(grad, training_dtype(grad)).add_(grad_x)
        return None, grad if needs_y else None, grad_x, None, None, *grads
