"""Causal attention of short sequences in a packed batch by one call of the kernels, with gradients.

torch's own attention, a call for each sequence, is the reference; and faster where they are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcore.ops.cpu import kernels

#: Rows of a sequence that is short: so many products are made pair by pair.
MAX_SHORT = 64


def kernels_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Do the kernels know such operands? Shapes as for `attend_short`."""
    return (
        query.is_cpu
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] % 16 == 0
        and key.shape == value.shape
        and kernels() is not None
    )


def attend_short(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """Semantics: out[i] = softmax(scale · qᵢ · kⱼ over the j ≤ i of i's sequence) · v.

    A sequence's rows and gradients depend on nothing outside it. Sums are float32.

    Args:
        query: `[1, heads, rows, dim]`; key, value: `[1, kv_heads, rows, dim]`; of one dtype.
        sequences: [start, end) of each, in order; rows in none give zeros.

    Returns: `[1, rows, heads, dim]`.
    """
    out: Tensor = _AttendShort.apply(query, key, value, list(sequences), scale)
    return out


class _AttendShort(torch.autograd.Function):
    """Saves the operands, the result and for each row the log of its sum."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: list[tuple[int, int]],
        scale: float,
    ) -> Tensor:
        operands = [_features_together(t) for t in (query, key, value)]
        out, log_sums = kernels().attend_short(*operands, sequences, scale)
        ctx.save_for_backward(*operands, out, log_sums)
        ctx.sequences, ctx.scale = sequences, scale
        result: Tensor = out.transpose(1, 2)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        upstream = _features_together(grad.transpose(1, 2))
        grads = kernels().attend_short_back(upstream, *ctx.saved_tensors, ctx.sequences, ctx.scale)
        return (*grads, None, None)


def _features_together(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
