"""What an optimizer does to many small parameters together: bounding gradients, AdamW's step.

By one call of the kernels each where all is float32 in a CPU's memory, else by torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from peftcore.ops.cpu import kernels


def clip_norm_(tensors: Sequence[Tensor], limit: float) -> float:
    """The norm of all values together; scaled down in place to `limit` where it is more.

    As `torch.nn.utils.clip_grad_norm_`; where the norm is not finite the tensors may be anything.
    """
    if _kernels_know(tensors):
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


def adamw_(
    values: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    count: int,
) -> None:
    """The `count`-th step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), in place.

    Args:
        grads, means, squares: of each parameter, in its shape: the gradient, the running means of
            it and of its square.
    """
    if _kernels_know((*values, *grads, *means, *squares)):
        kernels().adamw_(values, grads, means, squares, lr, beta1, beta2, eps, weight_decay, count)
        return
    step = torch.tensor(float(count), device=values[0].device)
    torch._fused_adamw_(
        values,
        grads,
        means,
        squares,
        [],
        [step] * len(values),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _kernels_know(tensors: Iterable[Tensor]) -> bool:
    return kernels() is not None and all(
        t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() for t in tensors
    )
