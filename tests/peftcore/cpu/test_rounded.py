"""Quantized matmul of rounded inputs: against float64 of the same rounding, and its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
)

QUANTIZATIONS = ["int8", "nf4"]
BITS = [8, 16, 24]
#: The largest code: 127 in each of its bytes, or a little less.
LARGEST = {8: 127, 16: 127 * 256 + 127, 24: (127 * 256 + 127) * 256 + 123}
#: (out, in): less than a group of inputs, a whole one, a little more, many; part of a tile, one,
#: two, three, many.
SHAPES = [(1, 8), (16, 64), (17, 72), (33, 128), (48, 136), (100, 1032), (1600, 64)]
#: No whole quad of inputs.
INT8_SHAPES = [(5, 1), (20, 6), (33, 131)]
#: (start, count): rows out of a batch that are computed again without the others.
PARTS = [(0, 1), (3, 1), (0, 6), (2, 7), (9, 16), (5, 18), (5, 19), (100, 193), (0, 399)]


def group_of(quantization: str, in_: int) -> int:
    """Inputs of a step: an nf4 weight's own groups, or 128."""
    return next(g for g in (64, 32, 16, 8) if in_ % g == 0) if quantization == "nf4" else 128


def rounded(x: Tensor, quantization: str, bits: int) -> tuple[Tensor, Tensor]:
    """Inputs to the nearest of the steps that their group's largest value gives, and the steps."""
    rows, in_ = x.shape
    group = group_of(quantization, in_)
    parts = F.pad(x, (0, -in_ % group)).view(rows, -1, group)
    top = parts.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(top, LARGEST[bits]) / top  # a number / a tensor would round twice
    codes = (parts * inverse).round()  # as float32 rounds the product
    steps = (top / LARGEST[bits]).expand_as(parts)
    flat = [t.reshape(rows, -1)[:, :in_].double() for t in (codes * steps, steps)]
    return flat[0], flat[1]


def rows_of(count: int, in_: int) -> Tensor:
    """Of sizes that differ from row to row and, by outliers, from group to group."""
    g = generator(7)
    x = torch.randn(count, in_, generator=g) * torch.logspace(-3, 3, count)[:, None]
    outliers = torch.rand(count, in_, generator=g) < 0.01
    return torch.where(outliers, 100 * x, x)


def linear(x: Tensor, base: Base, batch: Any = None) -> Tensor:
    found: Tensor = kernels().linear(x, [base.kernel], [0], batch)[0]
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("quantization", "shape"),
    [*((q, s) for q in QUANTIZATIONS for s in SHAPES), *(("int8", s) for s in INT8_SHAPES)],
    ids=str,
)
def test_the_product_of_rounded_inputs(
    ops: Any, quantization: str, shape: tuple[int, int], bits: int
) -> None:
    for bias in (False, True):
        base = Base.make(quantization, *shape, bias=bias, activation_bits=bits)
        for num_rows in (1, 2, 6, 7, 16, 18, 19, 33, 200):
            x = rows_of(num_rows, shape[1])
            before = x.clone()
            near, steps = rounded(x, quantization, bits)
            # Of the products of a table of 24 bits what is less than a few steps is left away.
            left = 2 * steps.sum(1, keepdim=True) if (quantization, bits) == ("nf4", 24) else 0
            for y in by_threads(lambda x=x, base=base: linear(x, base)):
                assert_near(y, base.multiply(near), base.magnitude(near) + left / 2e-6)
            assert torch.equal(x, before)


@pytest.mark.parametrize("bits", BITS)
def test_the_loss_is_half_a_step_of_each_input(ops: Any, bits: int) -> None:
    base = Base.make("int8", 64, 512, activation_bits=bits)
    x = rows_of(40, 512)
    _, steps = rounded(x, "int8", bits)
    bound = 0.51 * steps @ base.exact.abs().T + 2e-6 * base.magnitude(x)
    assert bool(((linear(x, base).double() - base.multiply(x)).abs() <= bound).all())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_three_bytes_are_as_near_as_float32(ops: Any, quantization: str) -> None:
    """To float64, beside torch's sums of floats; also where a group's inputs differ much."""
    base = Base.make(quantization, 100, 1536, activation_bits=24)
    x = rows_of(40, 1536)
    x[:20, 7] *= 3000
    exact = base.multiply(x)
    ours, torchs = (
        ((y.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()
        for y in (linear(x, base), F.linear(x, base.exact.float()))
    )  # of the worst row: how torch sums differs among CPUs, and a row of its may be all but exact
    assert ours <= 3 * torchs


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_extreme_codes(ops: Any, quantization: str, bits: int) -> None:
    """The largest weights times the largest inputs of both signs: no sum overflows."""
    base = Base.make(quantization, 32, 256, activation_bits=bits)
    largest = base.exact.sign().float()
    x = torch.cat([largest[:4], -largest[:4], torch.ones(1, 256), -torch.ones(1, 256)]) * 3.0
    near, _ = rounded(x, quantization, bits)
    assert_near(linear(x, base), base.multiply(near), base.magnitude(near))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_zeros_and_what_is_not_finite(ops: Any, quantization: str, bits: int) -> None:
    """A row of zeros gives the bias, one that is not finite gives NaN, and its neighbours none."""
    base = Base.make(quantization, 20, 192, bias=True, activation_bits=bits)
    x = rows_of(6, 192)
    expected = linear(x, base)
    x[1], x[2, 70], x[3, 5], x[4, 100] = 0.0, torch.nan, torch.inf, -torch.inf
    y = linear(x, base)
    assert base.bias is not None
    assert torch.equal(y[1], base.bias)
    assert bool(y[2:5].isnan().all())
    assert torch.equal(y[[0, 5]], expected[[0, 5]])
    tiny = torch.full((1, 192), 1e-38)
    assert torch.equal(linear(tiny, base)[0], base.bias)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shape", [(90, 96), (1000, 40), (130, 1104)], ids=str)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(
    ops: Any, quantization: str, shape: tuple[int, int], bits: int
) -> None:
    base = Base.make(quantization, *shape, bias=True, activation_bits=bits)
    x = rows_of(400, shape[1])
    one, two = by_threads(lambda: linear(x, base))
    assert torch.equal(one, two)
    for start, count in PARTS:
        for y in by_threads(lambda s=start, n=count: linear(x[s : s + n], base)):
            assert torch.equal(y, one[start : start + count])


@pytest.mark.parametrize("bits", BITS)
def test_adapters_read_the_inputs_as_they_are(ops: Any, bits: int) -> None:
    """Only the base's are rounded, after the adapters' input scales."""
    base = Base.make("int8", 48, 192, bias=True, activation_bits=bits)
    for num_rows in (5, 16, 40):
        x = rows_of(num_rows, 192)
        segments = [
            Rows(0, 2, {0: At.make(192, 48, 8, vectors="iob")}),
            Rows(2, num_rows, {0: At.make(192, 48, 3, dtype=torch.float16)}, 0.5),
        ]
        inputs = scaled(x, 0, segments).float()
        near, _ = rounded(inputs, "int8", bits)
        exact = adapted(base.multiply(near), inputs, 0, segments)
        magnitude = adapted(base.magnitude(near), inputs.abs(), 0, absolute(segments))
        assert_near(linear(x, base, batch_of(segments)), exact, magnitude)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("rank", [1, 8, 16, 32, 40, 150])
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_adapters_meet_rounded_inputs(
    ops: Any, quantization: str, rank: int, bits: int
) -> None:
    """Where those are of sixteen bits; and B's are A's results, rounded as well. Of eight bits an
    adapter knows nothing."""
    for in_ in (192, 1104):
        base = Base.make(quantization, 70, in_, bias=True, activation_bits=bits)
        for num_rows in (5, 16, 230):
            x = rows_of(num_rows, in_)
            segments = [
                Rows(0, 2, {0: At.make(in_, 70, rank, dtype=torch.int8, vectors="iob")}),
                Rows(2, num_rows, {0: At.make(in_, 70, rank, dtype=torch.int8, seed=1)}, 0.5),
            ]
            inputs = scaled(x, 0, segments).float()
            near, _ = rounded(inputs, quantization, bits)
            of_adapters = near if bits == 16 else inputs.double()
            exact = adapted(base.multiply(near), of_adapters, 0, segments)
            magnitude = adapted(base.magnitude(near), of_adapters.abs(), 0, absolute(segments))
            loss = torch.zeros_like(exact)
            for s in segments if bits == 16 else ():
                at = s.adapter[0]
                assert at.a_t is not None
                assert at.b is not None
                shrunk = of_adapters[s.start : s.end] @ at.a_t * at.scale * s.weight
                half_steps = 0.51 * shrunk.abs().amax(1, keepdim=True) / LARGEST[16]
                loss[s.start : s.end] = half_steps * at.b.double().abs().sum(1)
                if at.out_scale is not None:
                    loss[s.start : s.end] *= at.out_scale.double()
            for y in by_threads(lambda b=base, x=x, s=segments: linear(x, b, batch_of(s))):
                error = (y.double() - exact).abs()
                assert bool((error <= 2e-6 * magnitude + loss).all())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("rank", [8, 16, 32, 40])
def test_a_row_with_codes_has_the_same_bits_whatever_stands_beside_it(
    ops: Any, quantization: str, rank: int
) -> None:
    """Alone, among others that share a tile, or by AMX where there is AMX and the rank is long."""
    base = Base.make(quantization, 70, 1104, activation_bits=16)
    at = {0: At.make(1104, 70, rank, dtype=torch.int8)}
    x = rows_of(400, 1104)
    one, two = by_threads(lambda: linear(x, base, batch_of([Rows(0, 399, at)])))
    assert torch.equal(one, two)
    for start, count in PARTS:
        rows = x[start : start + count]
        for y in by_threads(lambda r=rows: linear(r, base, batch_of([Rows(0, len(r), at)]))):
            assert torch.equal(y, one[start : start + count])


def test_modules_of_one_launch_that_round_differently(ops: Any) -> None:
    bases = [
        Base.make(quantization, 30, 192, seed=i, activation_bits=bits)
        for i, (quantization, bits) in enumerate(
            [
                *(("int8", 16), ("nf4", 16), ("nf4", 8), ("int8", 0), ("nf4", 0), ("int8", 16)),
                *(("nf4", 24), ("int8", 24)),
            ]
        )
    ]
    for num_rows in (3, 12, 50):
        x = rows_of(num_rows, 192)
        together = ops.linear(x, [base.kernel for base in bases], [*range(8)], None)
        assert all(torch.equal(y, linear(x, b)) for y, b in zip(together, bases, strict=True))
