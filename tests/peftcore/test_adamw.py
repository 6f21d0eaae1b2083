"""Our AdamW against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcore.train.adamw import AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs_to_the_last_bit(weight_decay: float) -> None:
    """Under a schedule, with parameters that miss some steps."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(3, 40), (17,), (8, 5)]]
    ours, torchs = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    groups = [
        [{"params": ps[:2], "weight_decay": weight_decay}, {"params": ps[2:], "weight_decay": 0.0}]
        for ps in (ours, torchs)
    ]
    one, other = AdamW(groups[0], lr=0.1), torch.optim.AdamW(groups[1], lr=0.1, fused=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4) for o in (one, other)]
    for i in range(6):
        for j, (p, q) in enumerate(zip(ours, torchs, strict=True)):
            grad: Tensor | None = torch.randn(p.shape, generator=generator)
            p.grad = q.grad = None if i % 3 == j else grad
        one.step()
        other.step()
        for schedule in schedules:
            schedule.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, torchs, strict=True))
