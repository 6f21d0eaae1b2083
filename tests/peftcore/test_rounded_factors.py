"""Low-rank updates' factors as int8: how far off, and what is rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcore.packing import bind, pack, packed_size
from peftcore.primitives import LowRank, OutputScale
from tests.peftcore.test_packing import noise, of, through_a_file


def error_of_rounding(a: Tensor, b: Tensor) -> Tensor:
    """Of B A's elements at most: every factor is off by half a step, a rank's largest / 127."""
    a_off = a.abs().amax(1, keepdim=True) / 254 * torch.ones_like(a)
    b_off = b.abs().amax(0, keepdim=True) / 254 * torch.ones_like(b)
    return b_off @ a.abs() + b.abs() @ a_off + b_off @ a_off


@pytest.mark.parametrize("rank", [8, 9, 16, 40])
@pytest.mark.parametrize(("out", "in_"), [(20, 50), (64, 7), (1, 64)])
def test_rounded_factors_are_off_by_half_a_step(rank: int, out: int, in_: int) -> None:
    a = noise(rank, in_) * torch.logspace(-3, 3, rank)[:, None]
    b = noise(out, rank)
    a[1] = 0
    b[:, 2] = 0
    a[3], b[:, 3] = 1e-30, 1e-30  # their product is nothing
    packed = through_a_file(pack(of(LowRank("m", a, b, 0.5)), torch.int8))
    low_rank = bind("d", packed.layout, packed.data, 0).modules["m"].low_rank
    assert low_rank is not None
    assert low_rank.a.dtype == low_rank.b_tiles.dtype == torch.int8
    assert low_rank.a_t.shape == (in_, -(-rank // 4) * 4)
    found = (low_rank.a_t.double() @ low_rank.b_t.double()).T
    error = (found - b.double() @ a.double()).abs()
    assert bool((error <= 1.0001 * error_of_rounding(a.double(), b.double()) + 1e-12).all())
    assert float(error.max()) > 0
    assert int(low_rank.a.max()) == 127
    assert (low_rank.in_, low_rank.out, low_rank.scale) == (in_, out, 0.5)
    assert packed.num_bytes == packed_size(of(LowRank("m", a, b, 0.5))).num_bytes(torch.int8)


def test_what_is_rounded() -> None:
    """Of a rank below eight halves are as small; and nothing but factors is."""
    program = of(
        LowRank("small", noise(7, 64).half().float(), noise(32, 7).half().float(), 1.0),
        LowRank("exact", noise(7, 64), noise(32, 7), 1.0),
        LowRank("large", noise(8, 64), noise(32, 8), 1.0),
        OutputScale("large", torch.ones(32)),
    )
    packed = pack(program, torch.int8)
    dtypes = [{place.dtype for place in places} for _, places in packed.layout]
    assert dtypes == [
        {torch.float16}, {torch.float32}, {torch.int8, torch.float32}, {torch.float32}
    ]  # fmt: skip
    # A: 16 outputs, B: 2 tiles of 8 · 16, and 16 scales that take the place of 64.
    large = 16 * 64 + 256 + 64 * 4
    assert packed.num_bytes == (448 + 256) * 2 + (448 + 256) * 4 + large + 64 * 4
    assert packed.num_bytes == packed_size(program).num_bytes(torch.int8)


def test_an_adapter_of_zeros_is_rounded_to_zeros() -> None:
    packed = pack(of(LowRank("m", noise(8, 20), torch.zeros(30, 8), 1.0)), torch.int8)
    low_rank = bind("d", packed.layout, packed.data, 0).modules["m"].low_rank
    assert low_rank is not None
    assert torch.equal(low_rank.b_t, torch.zeros(8, 30))
    assert bool(low_rank.a_t.isfinite().all())
