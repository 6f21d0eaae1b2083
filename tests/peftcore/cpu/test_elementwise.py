"""RMSNorm and gates against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.peftcore.cpu.cases import by_threads, generator

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 64, 100, 576, 2048])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(ops: Any, dim: int, offset: float) -> None:
    weight = noise(dim, seed=1)
    for rows in (1, 2, 9, 70):
        for factor in (1e-3, 1.0, 1e3):
            x = noise(rows, dim) * factor
            before = x.clone()
            for eps in (1e-6, 1e-1):
                expected = F.rms_norm(x.double(), (dim,), (offset + weight).double(), eps)
                for found in by_threads(lambda x=x, e=eps: ops.rms_norm(x, weight, offset, e)):
                    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=3e-6)
            assert torch.equal(x, before)


def test_rms_norm_of_views_and_leading_dimensions(ops: Any) -> None:
    x, weight = noise(2, 3, 5, 40), noise(20, seed=1)
    for view in (x[..., :20], x[:, 1, :, 20:], x[0, 0, 0, :20], x[:0, ..., :20]):
        found = ops.rms_norm(view, weight, 0.0, 1e-5)
        torch.testing.assert_close(found, F.rms_norm(view, (20,), weight, 1e-5))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000, 4096, 4097, 40000])
def test_gates(ops: Any, name: str, count: int) -> None:
    x, up = noise(count) * 4, noise(count, seed=1)
    expected = ACTIVATIONS[name](x.double()) * up.double()
    before = up.clone()

    def gated() -> Tensor:
        gate = x.clone()
        ops.gate_(gate, up, name)
        return gate

    one, two = by_threads(gated)
    torch.testing.assert_close(one.double(), expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(one, two)
    assert torch.equal(up, before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_over_all_magnitudes(ops: Any, name: str) -> None:
    """To a relative error where the result is no rounding of another one; NaN stays NaN."""
    sizes = torch.logspace(-30, 4, 1001)
    for x in (torch.linspace(-120, 120, 4801), sizes, -sizes):
        found = x.clone()
        ops.gate_(found, torch.ones_like(x), name)
        exact = ACTIVATIONS[name](x.double())
        # The largest power is e^88; 1 − 1 / (1 + e^u) cancels for u below 0.
        atol = 1e-33 if name == "silu" else 2e-6
        torch.testing.assert_close(found.double(), exact, atol=atol, rtol=3e-6)
    x = torch.tensor([torch.nan, 1.0, torch.inf])
    ops.gate_(x, torch.ones(3), name)
    assert x.isnan().tolist() == [True, False, False]
    assert x[2] == torch.inf


@pytest.mark.parametrize("dim", [20, 576])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(ops: Any, dim: int) -> None:
    x, weight, up = noise(300, dim), noise(dim, seed=1), noise(300, dim, seed=2)

    def gated(rows: slice, name: str) -> Tensor:
        gate = x[rows].clone()
        ops.gate_(gate, up[rows].contiguous(), name)
        return gate

    normed, other = by_threads(lambda: ops.rms_norm(x, weight, 0.0, 1e-6))
    assert torch.equal(normed, other)
    for name in ACTIVATIONS:
        whole, other = by_threads(lambda name=name: gated(slice(0, 300), name))
        assert torch.equal(whole, other)
        for start, count in [(0, 1), (299, 1), (7, 5), (100, 150)]:
            rows = slice(start, start + count)
            for found in by_threads(lambda r=rows: ops.rms_norm(x[r], weight, 0.0, 1e-6)):
                assert torch.equal(found, normed[rows])
            for found in by_threads(lambda r=rows, name=name: gated(r, name)):
                assert torch.equal(found, whole[rows])
