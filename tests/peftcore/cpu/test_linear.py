"""Quantized matmul and segmented adapters against float64; a row alone and among others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcore.ops.cpu import kernels
from tests.peftcore.cpu.cases import (
    At,
    Base,
    Rows,
    absolute,
    adapted,
    assert_near,
    batch_of,
    by_threads,
    generator,
    scaled,
    threads,
)

QUANTIZATIONS = ["int8", "nf4"]
#: (out, in): one number, part of a tile, one tile, register tiles of 1, 2 and 4 and their tails,
#: scales that go over rows, one panel of inputs, a little more than one, three, many tiles.
SHAPES = [
    (1, 8), (1, 64), (3, 24), (15, 64), (16, 64), (17, 96), (33, 72), (64, 64), (100, 136),
    (7, 1024), (20, 1032), (50, 2080), (1600, 32), (8200, 8),
]  # fmt: skip
#: int8 inputs come in any number.
INT8_SHAPES = [(1, 1), (1, 2), (3, 5), (33, 70), (17, 127), (20, 1026), (8200, 3)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int8]
#: A mixture of a few ranks: one, pairs, no multiple of four, a whole register tile, many.
RANKS = [1, 2, 3, 4, 7, 16, 33, 64]
#: (start, count): rows out of a batch that are computed again without the others.
PARTS = [(0, 1), (3, 1), (399, 1), (1, 5), (0, 6), (2, 7), (9, 16), (13, 64), (100, 193), (0, 199)]
ADAPTED_PARTS = [
    (0, 1),
    (40, 1),
    (40, 5),
    (42, 1),
    (50, 4),
    (47, 33),
    (245, 2),
    (38, 16),
    (99, 200),
]


def rows_of(count: int, in_: int, seed: int = 0) -> Tensor:
    return torch.randn(count, in_, generator=generator(seed + 1000))


def assert_linear(
    results: Sequence[Tensor], x: Tensor, bases: Mapping[int, Base], segments: Sequence[Rows] = ()
) -> None:
    for (id_, base), y in zip(bases.items(), results, strict=True):
        inputs = scaled(x, id_, segments)
        magnitude = base.magnitude(inputs)
        magnitude = adapted(magnitude, inputs.abs(), id_, absolute(segments))
        assert_near(y, adapted(base.multiply(inputs), inputs, id_, segments), magnitude)


def linear(x: Tensor, bases: Mapping[int, Base], segments: Sequence[Rows] = ()) -> list[Tensor]:
    batch = batch_of(segments) if segments else None
    found: list[Tensor] = kernels().linear(x, [b.kernel for b in bases.values()], [*bases], batch)
    return found


# -- the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "shape"),
    [*product(QUANTIZATIONS, SHAPES), *product(["int8"], INT8_SHAPES)],
    ids=str,
)
def test_quantized_matmul(ops: Any, quantization: str, shape: tuple[int, int]) -> None:
    """One row, each register tile's rows and one more, many; with and without a bias."""
    for bias in (False, True):
        base = Base.make(quantization, *shape, bias=bias)
        for num_rows in (1, 2, 5, 6, 7, 12, 13, 16, 17, 33):
            x = rows_of(num_rows, shape[1])
            before = x.clone()
            assert_linear(linear(x, {3: base}), x, {3: base})
            assert torch.equal(x, before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("num_rows", [191, 192, 193, 200, 209, 400])
def test_more_rows_than_a_task_takes(ops: Any, quantization: str, num_rows: int) -> None:
    base = Base.make(quantization, 70, 1104, bias=True)
    x = rows_of(num_rows, 1104)
    for y in by_threads(lambda: linear(x, {0: base})):
        assert_linear(y, x, {0: base})


def test_every_nf4_code_and_int8_code(ops: Any) -> None:
    """A unit vector reads one weight."""
    for quantization in QUANTIZATIONS:
        base = Base.make(quantization, 17, 256)
        found = linear(torch.eye(256), {0: base})[0]
        torch.testing.assert_close(found.double(), base.exact.T, atol=0, rtol=3e-7)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_leading_dimensions_and_views(ops: Any, quantization: str) -> None:
    base = Base.make(quantization, 24, 32)
    x = rows_of(12, 64)
    for view in (x[:, 32:], x[::2, :32], x.view(2, 6, 64)[..., :32], x[0, :32], x[:0, :32]):
        (y,) = linear(view, {0: base})
        assert y.shape == (*view.shape[:-1], 24)
        assert_linear([y.view(-1, 24)], view.reshape(-1, 32), {0: base})


def test_several_modules_of_one_launch(ops: Any) -> None:
    """Of different sizes and codes; each with its own adapters, or with none."""
    bases = {
        5: Base.make("nf4", 64, 96, bias=True, seed=1),
        2: Base.make("int8", 33, 96, seed=2),
        9: Base.make("nf4", 7, 96, seed=3),
        4: Base.make("int8", 200, 96, bias=True, seed=4),
    }
    first = {5: At.make(96, 64, 8, vectors="iob"), 4: At.make(96, 200, 3, seed=1)}
    second = {2: At.make(96, 33, vectors="i", seed=2), 4: At.make(96, 200, 16, vectors="i")}
    for num_rows in (3, 7, 16, 20, 200):
        x = rows_of(num_rows, 96)
        segments = [Rows(0, 1, second), Rows(1, num_rows - 1, first)]
        for results in by_threads(lambda x=x, s=segments: linear(x, bases, s)):
            assert_linear(results, x, bases, segments)
        alone = [linear(x, {id_: base}, segments)[0] for id_, base in bases.items()]
        assert all(map(torch.equal, alone, results))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_unpacked_weights(ops: Any, quantization: str) -> None:
    """Any range of outputs, float32 and bfloat16, with an int8 weight's scales and without."""
    for out, in_ in [(1, 8), (16, 64), (50, 72), (33, 1032), (9, 2051)]:
        if quantization == "nf4" and in_ % 8:
            continue
        base = Base.make(quantization, out, in_)
        ranges = {(0, out), (0, 1), (out - 1, out), (out // 3, out), (out // 2, out // 2 + 1)}
        for start, stop in ranges:
            for dtype in (torch.float32, torch.bfloat16):
                found = torch.full((in_, stop - start), torch.nan, dtype=dtype)
                ops.unpack_(base.kernel, start, stop, True, found)
                exact = base.exact[start:stop].T
                rtol = 3e-7 if dtype == torch.float32 else 4e-3
                torch.testing.assert_close(found.double(), exact, atol=0, rtol=rtol)
                if dtype == torch.bfloat16:
                    whole = torch.empty(in_, stop - start)
                    ops.unpack_(base.kernel, start, stop, True, whole)
                    assert torch.equal(found, whole.bfloat16())  # rounded as torch does
        if quantization == "int8":
            codes = torch.empty(in_, out)
            ops.unpack_(base.kernel, 0, out, False, codes)
            assert torch.equal(codes, codes.round())
            assert torch.equal(codes.abs() > 0, base.exact.T.abs() > 0)


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [*RANKS, 100])
def test_a_segment_of_every_rank(ops: Any, rank: int, dtype: torch.dtype) -> None:
    for out, in_ in [(1, 2), (16, 16), (17, 15), (40, 70), (130, 1104)]:
        base = Base.make("int8", out, in_, bias=True)
        for num_rows in (1, 4, 5, 9):
            x = rows_of(num_rows, in_)
            at = {0: At.make(in_, out, rank, dtype=dtype, vectors="iob", seed=rank)}
            segments = [Rows(0, num_rows, at, 1.5)]
            assert_linear(linear(x, {0: base}, segments), x, {0: base}, segments)


def test_factors_are_read_as_their_dtype_says(ops: Any) -> None:
    """Halves that a float32 reader would take for others: the exact values, no tolerance."""
    x = torch.eye(16)
    for dtype in FLOATS:
        a, b = torch.zeros(1, 16, dtype=dtype), torch.ones(16, 1, dtype=dtype)
        a[0] = torch.tensor([2.0**-k * (1 + k / 64) for k in range(16)]).to(dtype)
        y = torch.zeros(16, 16)
        ops.add_adapters_(y, x, 0, batch_of([Rows(0, 16, {0: At(16, 16, a, b, 2.0)})]))
        assert torch.equal(y, 2 * a.float().T.expand(16, 16))


@pytest.mark.parametrize("vectors", ["", "i", "o", "b", "io", "ib", "ob", "iob"])
@pytest.mark.parametrize("rank", [0, 5])
def test_each_kind_of_change_alone_and_with_others(ops: Any, rank: int, vectors: str) -> None:
    for out, in_ in [(1, 2), (19, 33)]:
        base = Base.make("int8", out, in_)
        x = rows_of(11, in_)
        at = {0: At.make(in_, out, rank, vectors=vectors)}
        segments = [Rows(1, 4, at, -0.5), Rows(4, 4, at), Rows(6, 11, at, 2.0)]
        (y,) = linear(x, {0: base}, segments)
        assert_linear([y], x, {0: base}, segments)
        plain = linear(x, {0: base})[0]
        untouched = [0, 4, 5]
        assert torch.equal(y[untouched], plain[untouched])
        assert torch.equal(y, plain) == (not rank and not vectors)


@pytest.mark.parametrize("num_rows", [1, 8, 16, 200, 400])
def test_a_batch_of_many_adapters(ops: Any, num_rows: int) -> None:
    """Ranks, dtypes and kinds mixed, some of other modules only, rows of the base between them."""
    rng = random.Random(num_rows)
    base = {7: Base.make("nf4", 90, 160, bias=True)}
    segments, start = [], 0
    while start < num_rows:
        end = min(num_rows, start + rng.choice([1, 1, 2, 9, 70]))
        vectors = rng.choice(["", "i", "ob", "iob"])
        at = At.make(
            160, 90, rng.choice([0, *RANKS]), dtype=rng.choice(DTYPES), vectors=vectors, seed=start
        )
        segments.append(Rows(start, end, {rng.choice([7, 7, 7, 8]): at}, rng.uniform(-2, 2)))
        start = end + rng.choice([0, 0, 1])
    x = rows_of(num_rows, 160)
    one, two = by_threads(lambda: linear(x, base, segments))
    assert_linear(one, x, base, segments)
    assert torch.equal(one[0], two[0])


def test_a_mixture(ops: Any) -> None:
    """Several adapters on the same rows, each with its weight; and rows that only one covers."""
    base = {0: Base.make("int8", 48, 64, bias=True)}
    ats = [
        {0: At.make(64, 48, rank, dtype=dtype, vectors=vectors, seed=rank)}
        for rank, dtype, vectors in [
            (4, torch.float32, "b"), (16, torch.float16, ""), (8, torch.int8, "b"),
        ]
    ]  # fmt: skip
    x = rows_of(12, 64)
    segments = [Rows(2, 7, ats[0], 0.5), Rows(2, 7, ats[1], -0.25), Rows(5, 12, ats[2], 2.0),
                Rows(2, 7, ats[0], 0.125)]  # fmt: skip
    assert_linear(linear(x, base, segments), x, base, segments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_on_top_of_another_modules_result(ops: Any, dtype: torch.dtype) -> None:
    """`scale_input`, the module that is not ours, `add_adapters_`."""
    for out, in_ in [(1, 2), (30, 50), (64, 1104)]:
        ats = [
            {0: At.make(in_, out, rank, dtype=dtype, vectors=vectors)}
            for rank, vectors in [(6, "ib"), (0, "o"), (33, "")]
        ]
        for num_rows in (6, 230):
            x, y = rows_of(num_rows, in_), rows_of(num_rows, out, 1)
            segments = [Rows(0, 2, ats[0]), Rows(3, 4, ats[1]), Rows(4, num_rows, ats[2], 0.5)]
            batch, before = batch_of(segments), x.clone()
            inputs = ops.scale_input(x, 0, batch)
            assert torch.equal(x, before)
            torch.testing.assert_close(inputs.double(), scaled(x, 0, segments), atol=0, rtol=1.2e-7)
            exact = adapted(y, inputs, 0, segments)
            magnitude = adapted(y.abs() + 1, inputs.abs(), 0, absolute(segments))
            plain = y.clone()
            ops.add_adapters_(y, inputs, 0, batch)
            assert_near(y, exact, magnitude)
            assert torch.equal(y[2], plain[2])


def test_what_touches_nothing_changes_nothing(ops: Any) -> None:
    at = {1: At.make(8, 4, 2)}
    batch = batch_of([Rows(0, 3, at), Rows(3, 3, {2: At.make(8, 4, 2, vectors="i")})])
    assert [batch.touches(id_) for id_ in range(4)] == [False, True, True, False]
    x, y = rows_of(3, 8), rows_of(3, 4)
    before = y.clone()
    for id_ in (0, 2, 3):  # the second by an empty segment only
        assert torch.equal(ops.scale_input(x, id_, batch), x)
        ops.add_adapters_(y, x, id_, batch)
    ops.add_adapters_(y, x, 1, ops.Batch([]))
    ops.add_adapters_(y[:0], x[:0], 1, batch_of([Rows(0, 0, at)]))
    assert torch.equal(y, before)
    assert len(ops.Adapter()) == 0
    assert len(Rows(0, 0, {1: At.make(8, 4, 2), 3: At.make(8, 4)}).kernel) == 2


def test_an_adapter_keeps_its_tensors_alive(ops: Any) -> None:
    """And one that is set anew at a module does what it was told last."""
    base = {0: Base.make("int8", 400, 300)}
    at = At.make(300, 400, 32, vectors="iob")
    rows = Rows(0, 5, {0: at})
    adapter = rows.kernel
    At.make(300, 400, 32, seed=5).put(adapter, 0)
    at.put(adapter, 0)
    x = rows_of(5, 300)
    batch = ops.Batch([(0, 5, adapter, 1.0)])
    del adapter
    first = ops.linear(x, [base[0].kernel], [0], batch)
    del base, at, rows
    waste = [torch.full((32, 400), 7.0) for _ in range(20)]
    base = {0: Base.make("int8", 400, 300)}
    assert torch.equal(ops.linear(x, [base[0].kernel], [0], batch)[0], first[0])
    assert len(waste) == 20


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    num_rows = draw(st.integers(1, 40))
    bounds = st.integers(0, num_rows)
    segment = st.tuples(
        bounds, bounds, st.sampled_from([0, *RANKS, 5, 12]), st.sampled_from(DTYPES),
        st.sampled_from(["", "o", "b", "i", "iob"]), st.floats(-2, 2),
    )  # fmt: skip
    return {
        "quantization": draw(st.sampled_from(QUANTIZATIONS)),
        "num_rows": num_rows,
        "out": draw(st.integers(1, 80)),
        "in_": 8 * draw(st.integers(1, 16)),
        "segments": draw(st.lists(segment, max_size=6)),
        "threads": draw(st.integers(1, 2)),
    }


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_any_batch(problem: dict[str, Any]) -> None:
    """Segments in any order: empty, overlapping, the same rows twice."""
    out, in_ = problem["out"], problem["in_"]
    base = {0: Base.make(problem["quantization"], out, in_, bias=True)}
    segments = [
        Rows(min(a, b), max(a, b), {0: At.make(in_, out, rank, dtype=dtype, vectors=v)}, weight)
        for a, b, rank, dtype, v, weight in problem["segments"]
    ]
    x = rows_of(problem["num_rows"], in_)
    with threads(problem["threads"]):
        assert_linear(linear(x, base, segments), x, base, segments)


# -- a row does not depend on others ---------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shape", [(90, 96), (1000, 40), (130, 1104)], ids=str)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(
    ops: Any, quantization: str, shape: tuple[int, int]
) -> None:
    """Alone, in the midst of others, at another place; by one thread and by two."""
    base = {0: Base.make(quantization, *shape, bias=True)}
    x = rows_of(400, shape[1])
    x[3] *= 1e4
    one, two = by_threads(lambda: linear(x, base)[0])
    assert torch.equal(one, two)
    for start, count in PARTS:
        for y in by_threads(lambda s=start, n=count: linear(x[s : s + n], base)[0]):
            assert torch.equal(y, one[start : start + count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_an_adapter_has_the_same_bits_whatever_stands_beside_it(
    ops: Any, dtype: torch.dtype
) -> None:
    """Its segment alone, longer, shorter, at another place, beside other adapters and modules."""
    out, in_ = 70, 152
    base = {0: Base.make("nf4", out, in_), 1: Base.make("int8", 500, in_)}
    ats = [
        {0: At.make(in_, out, rank, dtype=dtype, vectors="iob", seed=rank),
         1: At.make(in_, 500, rank, dtype=dtype, seed=rank)}
        for rank in (1, 6, 16, 33)
    ]  # fmt: skip
    x = rows_of(300, in_)
    owners = [0] * 41 + [1] * 3 + [None] * 2 + [2] * 200 + [3] * 54
    whole = [Rows(0, 41, ats[0]), Rows(41, 44, ats[1]), Rows(46, 246, ats[2], 0.5),
             Rows(46, 246, ats[0], 0.25), Rows(246, 300, ats[3])]  # fmt: skip
    one, two = by_threads(lambda: linear(x, base, whole))
    for i in range(2):
        assert torch.equal(one[i], two[i])
    for start, count in ADAPTED_PARTS:
        stop = start + count
        segments = [
            Rows(max(s.start, start) - start, min(s.end, stop) - start, s.adapter, s.weight)
            for s in whole
            if s.start < stop and s.end > start
        ]
        for results in by_threads(lambda s=start, e=stop, g=segments: linear(x[s:e], base, g)):
            for i in range(2):
                assert torch.equal(results[i], one[i][start:stop])
    plain = linear(x, base)
    base_rows = [i for i, owner in enumerate(owners) if owner is None]
    assert torch.equal(plain[0][base_rows], one[0][base_rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_adapters_have_the_same_bits_in_any_batch(ops: Any, dtype: torch.dtype) -> None:
    x, y = rows_of(250, 70), rows_of(250, 45, 1)
    rows = {0: At.make(70, 45, 11, dtype=dtype, vectors="ob")}
    batch = batch_of([Rows(0, 250, rows)])

    def whole() -> Tensor:
        result = y.clone()
        ops.add_adapters_(result, x, 0, batch)
        return result

    one, two = by_threads(whole)
    assert torch.equal(one, two)
    for start, count in [(0, 1), (249, 1), (31, 3), (9, 40), (100, 8)]:
        part = y[start : start + count].clone()
        ops.add_adapters_(part, x[start : start + count], 0, batch_of([Rows(0, count, rows)]))
        assert torch.equal(part, one[start : start + count])
