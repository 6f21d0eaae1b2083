"""The segmented update against the plain reference, and its gradients by gradcheck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peftcore.ops import reference
from peftcore.ops.autograd import add_low_rank
from peftcore.ops.segments import LowRankPart

#: Rows of each part: none, one for all, several, gaps, an empty one, overlapping ones (a mixture).
SPANS = {
    "whole": [(0, 9)],
    "neighbours": [(0, 4), (4, 9)],
    "gaps": [(1, 3), (5, 6)],
    "empty": [(2, 2), (3, 9)],
    "overlapping": [(0, 6), (3, 9), (3, 9)],
}


class Update(NamedTuple):
    """Leaves of the graph: A and B as adapters hold them."""

    start: int
    end: int
    a: Tensor
    b: Tensor
    scale: float


def parts_of(updates: Sequence[Update]) -> list[LowRankPart]:
    return [LowRankPart(s, e, a.t(), b.t(), scale) for s, e, a, b, scale in updates]


def world(spans: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Update]]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    updates = [
        Update(start, end, random(rank, 7), random(5, rank), scale)
        for (start, end), rank, scale in zip(spans, (3, 1, 4), (0.5, 2.0, -1.0), strict=False)
    ]
    return random(9, 5), random(9, 7), updates


@pytest.mark.parametrize("name", SPANS)
def test_forward_is_the_reference(name: str) -> None:
    y, x, updates = world(SPANS[name], torch.float32)
    expected = y.detach().clone()
    reference.add_low_rank_(expected, x, parts_of(updates))
    torch.testing.assert_close(add_low_rank(y.detach().clone(), x, parts_of(updates)), expected)


@pytest.mark.parametrize("name", SPANS)
def test_gradients(name: str) -> None:
    y, x, updates = world(SPANS[name], torch.float64)

    def function(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        made = [
            Update(u.start, u.end, a, b, u.scale)
            for u, a, b in zip(updates, factors[::2], factors[1::2], strict=True)
        ]
        return add_low_rank(y * 1.0, x, parts_of(made))

    factors = [t for u in updates for t in (u.a, u.b)]
    assert torch.autograd.gradcheck(function, (y, x, *factors))


def test_what_needs_no_gradient_gets_none() -> None:
    y, x, (first, second) = world(SPANS["neighbours"], torch.float32)
    frozen = Update(*second[:2], second.a.detach(), second.b.detach(), second.scale)
    parts = parts_of([first, frozen])
    add_low_rank(y.detach().clone(), x.detach(), parts).sum().backward()
    assert x.grad is None
    assert first.a.grad is not None
    assert first.b.grad is not None


def test_rows_of_one_adapter_do_not_reach_another() -> None:
    """Exactly: not a rounding error of it."""
    grads = []
    for factor in (1.0, 1e6):
        y, x, updates = world(SPANS["neighbours"], torch.float32)
        out = add_low_rank(y * 1.0, x, parts_of(updates))
        (out[:4].sum() + factor * out[4:].square().sum()).backward()
        grads.append((updates[0].a.grad, updates[0].b.grad))
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_a_base_in_bfloat16_keeps_float32_factors() -> None:
    y, x, updates = world(SPANS["neighbours"], torch.float32)
    expected = add_low_rank(y.detach().clone(), x, parts_of(updates))
    got = add_low_rank(y.detach().bfloat16(), x.bfloat16(), parts_of(updates))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.05)
    got.float().sum().backward()
    assert updates[0].a.grad is not None
    assert updates[0].a.grad.dtype == torch.float32
