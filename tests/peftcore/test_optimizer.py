"""Our clipping and our AdamW against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftcore.ops import optimizer
from peftcore.ops.optimizer import clip_norm_, plain_clip_norm_
from peftcore.train.adamw import AdamW

SHAPES = [(1,), (3, 5), (64, 17), (8, 16), (130,)]


@pytest.mark.parametrize("limit", [0.5, 1e6, float("inf")])
@pytest.mark.parametrize("clip", [clip_norm_, plain_clip_norm_])
def test_clipping_is_torchs(clip: Callable[..., object], limit: float) -> None:
    parameters = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape)
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    found = torch.as_tensor(clip(ours, limit), dtype=torch.float32)
    torch.testing.assert_close(found, norm)
    for p, grad in zip(parameters, ours, strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    tensors = [torch.randn(40), torch.full((3,), value)]
    assert not torch.isfinite(torch.tensor(clip_norm_(tensors, 1.0)))


def test_nothing_has_no_norm() -> None:
    assert clip_norm_([], 1.0) == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_adamw_makes_torchs_steps(
    weight_decay: float, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a schedule, with parameters that miss some steps; by torch's own kernel bit by bit."""
    if not by_kernels:
        monkeypatch.setattr(optimizer, "kernels", lambda: None)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, torchs = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    groups = [
        [{"params": ps[:2], "weight_decay": weight_decay}, {"params": ps[2:], "weight_decay": 0.0}]
        for ps in (ours, torchs)
    ]
    one, other = AdamW(groups[0], lr=0.1), torch.optim.AdamW(groups[1], lr=0.1, fused=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4) for o in (one, other)]
    for i in range(6):
        for j, (p, q) in enumerate(zip(ours, torchs, strict=True)):
            grad = torch.randn(p.shape, generator=generator)
            p.grad = q.grad = None if i % len(SHAPES) == j else grad
        one.step()
        other.step()
        for schedule in schedules:
            schedule.step()
        for p, q in zip(ours, torchs, strict=True):
            if by_kernels:
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(p, q)
