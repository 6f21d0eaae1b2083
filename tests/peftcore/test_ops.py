"""The segmented operations against one dense matrix a row, and the fast path against the plain."""

from __future__ import annotations

import inspect
import random
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcore.ops import (
    VARIABLE,
    BlocksPart,
    LowRankPart,
    MapPart,
    RowsPart,
    VectorPart,
    grouped,
    reference,
    select,
    status,
)
from peftcore.ops.cpu import kernels, kernels_status

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


@st.composite
def disjoint(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int]:
    """rows, disjoint parts (start, end) with rows of the base between them, a seed."""
    bounds = sorted(draw(st.lists(st.integers(0, 16), max_size=8)))
    num_rows = (bounds[-1] if bounds else 0) + draw(st.integers(0, 3))
    return num_rows, list(zip(bounds[::2], bounds[1::2], strict=False)), draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(problem=disjoint(), num_blocks=st.integers(1, 4), size=st.integers(1, 6))
def test_any_rotations(
    problem: tuple[int, list[tuple[int, int]], int], num_blocks: int, size: int
) -> None:
    num_rows, spans, seed = problem
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_blocks * size, generator=g)
    parts = [BlocksPart(*s, torch.randn(num_blocks, size, size, generator=g)) for s in spans]
    expected = x.clone()
    for start, end, blocks in parts:
        for i in range(start, end):
            for n in range(num_blocks):
                piece = slice(n * size, (n + 1) * size)
                for c in range(size):
                    expected[i, piece][c] = sum(
                        x[i, n * size + k] * blocks[n, k, c] for k in range(size)
                    )
    for ops in OPS.values():
        rotated = x.clone()
        ops.rotate_(rotated, parts)
        torch.testing.assert_close(rotated, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=150, deadline=None)
@given(problem=disjoint(), n_in=st.integers(1, 20), num=st.integers(1, 30), with_bias=st.booleans())
def test_any_replaced_maps_and_rows(
    problem: tuple[int, list[tuple[int, int]], int], n_in: int, num: int, with_bias: bool
) -> None:
    """Each against dense weights with the replaced rows written in."""
    num_rows, spans, seed = problem
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(num_rows, n_in, generator=g), torch.randn(num_rows, num, generator=g)
    hidden = torch.randn(num_rows, n_in, generator=g)
    tokens = torch.randint(0, num, (num_rows,), generator=g)
    bias = torch.randn(num, generator=g) if with_bias else None
    maps, columns, looked_up, low_rank = [], [], [], []
    mapped, with_columns, with_rows, added = y.clone(), y.clone(), hidden.clone(), hidden.clone()
    for start, end in spans:
        weight = torch.randn(num, n_in, generator=g)
        ids = torch.randperm(num, generator=g)[: 1 + seed % num]
        rows = torch.randn(len(ids), n_in, generator=g)
        a, b = torch.randn(3, num, generator=g), torch.randn(n_in, 3, generator=g)
        maps.append(MapPart(start, end, weight, bias))
        columns.append(RowsPart(start, end, ids, rows))
        looked_up.append(RowsPart(start, end, ids, rows, -1.5))
        low_rank.append(LowRankPart(start, end, a.T, b.T, 0.5))
        update = 0.5 * (b @ a).T
        for i in range(start, end):
            mapped[i] = weight @ x[i] + (0 if bias is None else bias)
            added[i] += update[tokens[i]]
            for j, row in zip(ids.tolist(), rows, strict=True):
                with_columns[i, j] = row @ x[i] + (0 if bias is None else bias[j])
                if tokens[i] == j:
                    with_rows[i] = -1.5 * row
    for ops in OPS.values():
        out = y.clone()
        ops.set_linear_(out, x, maps)
        torch.testing.assert_close(out, mapped, atol=1e-4, rtol=1e-4)
        out = y.clone()
        ops.set_columns_(out, x, columns, bias)
        torch.testing.assert_close(out, with_columns, atol=1e-4, rtol=1e-4)
        out = hidden.clone()
        ops.set_rows_of_ids_(out, tokens, looked_up)
        torch.testing.assert_close(out, with_rows, atol=1e-4, rtol=1e-4)
        out = hidden.clone()
        ops.add_low_rank_of_ids_(out, tokens, low_rank)
        torch.testing.assert_close(out, added, atol=1e-4, rtol=1e-4)


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
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_factors(ops: ModuleType, rows: torch.dtype, factors: torch.dtype) -> None:
    """As `pack` keeps them: to float32 rows they add all that their values say."""
    ((a, b, scale),) = adapters([8], 32, 24, seed=5)
    part = LowRankPart(1, 4, a.to(factors), b.to(factors), scale)
    x, y, tokens = torch.randn(5, 32).to(rows), torch.randn(5, 24).to(rows), torch.arange(27, 32)
    expected = dense_low_rank(y, x, [part])
    of_ids = dense_low_rank(y, torch.eye(32)[tokens], [part])
    looked_up = y.clone()
    ops.add_low_rank_(y, x, [part])
    ops.add_low_rank_of_ids_(looked_up, tokens, [part])
    assert y.dtype == looked_up.dtype == rows
    tolerance = (1e-5, 1e-5) if rows == torch.float32 else (0.05, 0.02)
    for result, exact in ((y, expected), (looked_up, of_ids)):
        torch.testing.assert_close(result.double(), exact, atol=tolerance[0], rtol=tolerance[1])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_half_precision_meets_float32_replacements(ops: ModuleType) -> None:
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(5, 6).bfloat16()
    weight, bias, ids = torch.randn(6, 8), torch.randn(6), torch.tensor([4, 1])
    blocks, hidden, tokens = torch.randn(2, 4, 4), x.clone(), torch.tensor([0, 1, 4, 2, 1])
    mapped, columns, rotated = y.clone(), y.clone(), x.clone()
    ops.set_linear_(mapped, x, [MapPart(1, 4, weight, bias)])
    ops.set_columns_(columns, x, [RowsPart(1, 4, ids, weight[:2])], bias)
    ops.rotate_(rotated, [BlocksPart(1, 4, blocks)])
    ops.set_rows_of_ids_(hidden, tokens, [RowsPart(0, 5, ids, weight[:2])])
    ops.add_low_rank_of_ids_(hidden, tokens, [LowRankPart(0, 1, weight, torch.eye(8), 1.0)])
    exact = x[1:4].float() @ weight.T + bias
    torch.testing.assert_close(mapped[1:4].float(), exact, atol=0.05, rtol=0.02)
    exact = x[1:4].float() @ weight[:2].T + bias[ids]
    torch.testing.assert_close(columns[1:4, ids].float(), exact, atol=0.05, rtol=0.02)
    exact = x[1:4].float() @ torch.block_diag(*blocks)
    torch.testing.assert_close(rotated[1:4].float(), exact, atol=0.05, rtol=0.02)
    exact = torch.stack([x[0].float() + weight[0], weight[1], weight[0], x[3].float(), weight[1]])
    torch.testing.assert_close(hidden.float(), exact, atol=0.05, rtol=0.02)
    assert {t.dtype for t in (mapped, columns, rotated, hidden)} == {torch.bfloat16}


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_parts_touch_nothing(ops: ModuleType) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    before = x.clone(), y.clone()
    ops.add_low_rank_(y, x, [])
    ops.scale_(x, [])
    ops.add_(y, [])
    ops.rotate_(x, [])
    ops.set_linear_(y, x, [])
    ops.set_columns_(y, x, [], None)
    ops.add_low_rank_of_ids_(y, torch.zeros(4, dtype=torch.long), [])
    ops.set_rows_of_ids_(y, torch.zeros(4, dtype=torch.long), [])
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


def test_select_chooses_by_device_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert select(cpu) is kernels()
    monkeypatch.setenv(VARIABLE, "torch")
    assert select(cpu) is None
    assert select(torch.device("cuda")) is None
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="POLYPEFT_OPS=fast"):
        select(cpu)


def test_grouped_has_the_operations_of_the_reference() -> None:
    names = [n for n, f in vars(reference).items() if inspect.isfunction(f)]
    assert len(names) == 8
    for name in names:
        mine, plain = (inspect.signature(getattr(m, name)) for m in (grouped, reference))
        assert list(mine.parameters) == list(plain.parameters)


def test_the_status_names_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert status(cpu) == kernels_status()
    monkeypatch.setenv(VARIABLE, "torch")
    assert status(cpu) == "torch"
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "triton")
    assert status(cpu) == "triton"
