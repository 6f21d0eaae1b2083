"""Bounding the norm of many small tensors together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftcore.ops.cpu import kernels


def clip_norm_(tensors: Sequence[Tensor], limit: float) -> float:
    """The norm of all values together; scaled down in place to `limit` where it is more.

    As `torch.nn.utils.clip_grad_norm_`; where the norm is not finite the tensors may be anything.
    """
    if kernels() is not None and all(
        t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    ):
        norm: float = kernels().clip_norm_(list(tensors), limit)
        return norm
    return float(plain_clip_norm_(tensors, limit))


def plain_clip_norm_(tensors: Sequence[Tensor], limit: float) -> Tensor:
    """As `clip_norm_`, by torch."""
    total = nn.utils.get_total_norm(tensors)
    if not torch.isfinite(total):
        return total
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for tensor in tensors:
        tensor.mul_(factor)
    return total
