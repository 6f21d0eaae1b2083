"""Our clipping against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftcore.ops.clip import clip_norm_, plain_clip_norm_

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
