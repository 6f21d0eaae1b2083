"""The segmented operations against one dense matrix a row, and the fast path against the plain."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcore.ops import LowRankPart, VectorPart, grouped, reference, select

OPS = {"reference": reference, "grouped": grouped}
POPULARITIES = ["distinct", "identical", "uniform", "zipf", "skewed"]


def popular(popularity: str, num_rows: int, num_adapters: int, seed: int) -> list[int]:
    """The adapter of each row."""
    rng = random.Random(seed)
    match popularity:
        case "distinct":
            return [i % num_adapters for i in range(num_rows)]
        case "identical":
            return [0] * num_rows
        case "uniform":
            return [rng.randrange(num_adapters) for _ in range(num_rows)]
        case "zipf":
            weights = [1 / (i + 1) for i in range(num_adapters)]
            return rng.choices(range(num_adapters), weights, k=num_rows)
        case _:  # one adapter has nine rows of ten
            return [
                0 if rng.random() < 0.9 else rng.randrange(num_adapters) for _ in range(num_rows)
            ]


def segments(owners: list[int]) -> list[tuple[int, int, int]]:
    """(start, end, adapter) of the runs of rows of one adapter."""
    found: list[tuple[int, int, int]] = []
    for i, owner in enumerate(owners):
        if found and found[-1][2] == owner:
            found[-1] = (found[-1][0], i + 1, owner)
        else:
            found.append((i, i + 1, owner))
    return found


def dense_low_rank(y: Tensor, x: Tensor, parts: list[LowRankPart]) -> Tensor:
    """y + x Wᵀ with W = Σ scale · B A, made for each row from the parts that hold it."""
    result = y.double().clone()
    for i in range(len(y)):
        for start, end, a_t, b_t, scale in parts:
            if start <= i < end:
                weight = scale * (b_t.double().T @ a_t.double().T)
                result[i] += weight @ x[i].double()
    return result


def dense_scale(x: Tensor, parts: list[VectorPart]) -> Tensor:
    factors = torch.ones(x.shape, dtype=torch.float64)
    for start, end, v, _ in parts:
        factors[start:end] *= v.double()
    return x.double() * factors


def dense_add(x: Tensor, parts: list[VectorPart]) -> Tensor:
    summands = torch.zeros(x.shape, dtype=torch.float64)
    for start, end, v, weight in parts:
        summands[start:end] += weight * v.double()
    return x.double() + summands


def adapters(
    ranks: list[int], n_in: int, n_out: int, seed: int
) -> list[tuple[Tensor, Tensor, float]]:
    """Aᵀ, Bᵀ and the factor of each; transposed views, as `bind` gives them."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(r, n_in, generator=g).T, torch.randn(n_out, r, generator=g).T / r, 0.5 + i)
        for i, r in enumerate(ranks)
    ]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_low_rank_for_every_popularity(ops: ModuleType, popularity: str, num_rows: int) -> None:
    """Ranks 1 to 64 beside each other, and rows of the base between them."""
    ranks = [1, 2, 3, 4, 8, 16, 33, 64]
    weights = adapters(ranks, 48, 40, seed=1)
    owners = popular(popularity, num_rows, len(ranks) + 1, seed=2)  # the last is the base
    parts = [
        LowRankPart(start, end, *weights[owner])
        for start, end, owner in segments(owners)
        if owner < len(ranks)
    ]
    x, y = torch.randn(num_rows, 48), torch.randn(num_rows, 40)
    expected = dense_low_rank(y, x, parts)
    base_rows = [i for i, owner in enumerate(owners) if owner == len(ranks)]
    before, x_before = y.clone(), x.clone()
    ops.add_low_rank_(y, x, parts)
    torch.testing.assert_close(y.double(), expected, atol=2e-4, rtol=1e-5)
    assert torch.equal(y[base_rows], before[base_rows])
    assert torch.equal(x, x_before)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, int, int, float]], int]:
    """rows, in, out, parts (start, end, rank, weight) that may overlap, a seed."""
    num_rows = draw(st.integers(0, 20))
    bounds = st.integers(0, num_rows)
    part = st.tuples(bounds, bounds, st.integers(1, 64), st.floats(-2, 2))
    parts = [(min(a, b), max(a, b), rank, w) for a, b, rank, w in draw(st.lists(part, max_size=8))]
    size = st.integers(1, 40)
    return num_rows, draw(size), draw(size), parts, draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_any_parts(problem: tuple[int, int, int, list[tuple[int, int, int, float]], int]) -> None:
    """Empty, single, overlapping (mixtures), the same rows twice, none at all."""
    num_rows, n_in, n_out, given_parts, seed = problem
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, n_in, generator=g)
    y = torch.randn(num_rows, n_out, generator=g)
    weights = adapters([rank for _, _, rank, _ in given_parts], n_in, n_out, seed)
    low_rank = [
        LowRankPart(start, end, a, b, scale * weight)
        for (start, end, _, weight), (a, b, scale) in zip(given_parts, weights, strict=True)
    ]
    vectors = [
        VectorPart(start, end, torch.randn(n_in, generator=g), weight)
        for start, end, _, weight in given_parts
    ]
    for ops in OPS.values():
        out, scaled, added = y.clone(), x.clone(), x.clone()
        ops.add_low_rank_(out, x, low_rank)
        ops.scale_(scaled, vectors)
        ops.add_(added, vectors)
        torch.testing.assert_close(
            out.double(), dense_low_rank(y, x, low_rank), atol=1e-3, rtol=1e-4
        )
        torch.testing.assert_close(scaled.double(), dense_scale(x, vectors), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(added.double(), dense_add(x, vectors), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_half_precision_activations(ops: ModuleType) -> None:
    """bf16 rows meet float32 adapters, and the result stays bf16."""
    ((a, b, scale),) = adapters([8], 32, 24, seed=3)
    x, y = torch.randn(5, 32).bfloat16(), torch.randn(5, 24).bfloat16()
    expected = dense_low_rank(y, x, [LowRankPart(1, 4, a, b, scale)])
    ops.add_low_rank_(y, x, [LowRankPart(1, 4, a, b, scale)])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_parts_touch_nothing(ops: ModuleType) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    before = x.clone(), y.clone()
    ops.add_low_rank_(y, x, [])
    ops.scale_(x, [])
    ops.add_(y, [])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_a_row_does_not_depend_on_its_segments_length() -> None:
    """The same row alone, and among others of its adapter and of others."""
    weights = adapters([1, 8, 64], 96, 80, seed=4)
    x, y = torch.randn(16, 96), torch.randn(16, 80)
    together = y.clone()
    parts = [LowRankPart(start, end, *weights[i]) for i, (start, end) in
             enumerate([(0, 5), (5, 15), (15, 16)])]  # fmt: skip
    grouped.add_low_rank_(together, x, parts)
    for part in parts:
        for i in range(part.start, part.end):
            alone = y[i : i + 1].clone()
            grouped.add_low_rank_(alone, x[i : i + 1], [part._replace(start=0, end=1)])
            torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-5)


def test_select_gives_the_operations_of_the_reference() -> None:
    ops = select(torch.device("cpu"))
    for name in ("add_low_rank_", "scale_", "add_"):
        assert callable(getattr(ops, name))
        assert callable(getattr(reference, name))
