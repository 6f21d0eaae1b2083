"""The segmented update against the plain reference, and its gradients by gradcheck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from peftcore.ops import reference
from peftcore.ops.autograd import add, add_low_rank, scale
from peftcore.ops.segments import LowRankPart, VectorPart

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


# -- vectors ---------------------------------------------------------------------------------------


def vectors(spans: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, list[VectorPart]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 5, generator=generator, dtype=dtype)
    made = [
        VectorPart(start, end, torch.randn(5, generator=generator, dtype=dtype).requires_grad_())
        for start, end in spans
    ]
    return x.requires_grad_(), made


@pytest.mark.parametrize("name", [n for n in SPANS if n != "overlapping"])
@pytest.mark.parametrize("operation", [scale, add], ids=["scale", "add"])
def test_vectors_are_the_reference_with_gradients(name: str, operation: Any) -> None:
    x, parts = vectors(SPANS[name], torch.float64)
    expected = x.detach().clone()
    {scale: reference.scale_, add: reference.add_}[operation](expected, parts)
    torch.testing.assert_close(operation(x.detach().clone(), parts), expected)
    with torch.no_grad():
        torch.testing.assert_close(operation(x.clone(), parts), expected)

    def function(x: Tensor, *vs: Tensor) -> Tensor:
        made = [part._replace(v=v) for part, v in zip(parts, vs, strict=True)]
        return operation(x * 1.0, made)

    assert torch.autograd.gradcheck(function, (x, *(part.v for part in parts)))


@pytest.mark.parametrize("operation", [scale, add], ids=["scale", "add"])
def test_vectors_over_bfloat16_keep_their_own_dtype(operation: Any) -> None:
    x, parts = vectors(SPANS["gaps"], torch.float32)
    expected = operation(x.detach().clone(), parts)
    got = operation(x.detach().bfloat16(), parts)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.02)
    got.float().sum().backward()
    assert parts[0].v.grad is not None
    assert parts[0].v.grad.dtype == torch.float32


def test_a_parts_own_input_takes_the_place_of_xs() -> None:
    """As after dropout: gradients reach it, and x by the other parts only."""
    y, x, updates = world(SPANS["neighbours"], torch.float64)
    dropped = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([dropped, x[4:]])
    expected = add_low_rank(y.detach().clone(), whole.detach(), parts_of(updates))
    got = add_low_rank(y.detach().clone(), x, parts_of(updates), [dropped, None])
    torch.testing.assert_close(got, expected)

    def function(x: Tensor, own: Tensor) -> Tensor:
        return add_low_rank(y * 1.0, x, parts_of(updates), [own, None])

    assert torch.autograd.gradcheck(function, (x, dropped))
