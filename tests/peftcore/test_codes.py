"""Codes against bitsandbytes' own operators, bit by bit."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from peftcore.quant import codes

#: With a last block that is not whole, an odd number of weights, and more than one chunk below.
SHAPES = [(1, 1), (3, 5), (7, 65), (48, 96), (64, 64), (257, 70)]


def weights(shape: tuple[int, int]) -> Tensor:
    """Rows of very different size, some of zeros, and values in the middle of two codes."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g) * torch.logspace(-4, 2, shape[0])[:, None]
    weight[1::5] = 0
    middles = codes._NF4_BOUNDS[: shape[1]]
    weight[2::5, : len(middles)] = middles
    weight[2::5, -1] = 1
    return weight


@pytest.fixture(params=[codes._CHUNK, 128])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_CHUNK", request.param)


@pytest.mark.parametrize("shape", [*SHAPES, (1030, 64)], ids=str)
@pytest.mark.parametrize("made_by", ["kernels", "torch"])
def test_nf4(
    shape: tuple[int, int], made_by: str, chunk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if made_by == "torch":
        monkeypatch.setattr(codes, "kernels", lambda: None)
    else:
        assert codes.kernels() is not None
    weight = weights(shape)
    before = weight.clone()
    expected, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    found, absmax = codes.quantize_nf4(weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(absmax, state.absmax, atol=0, rtol=0)
    assert torch.equal(weight, before)
    assert torch.equal(codes._NF4, state.code)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape: tuple[int, int], chunk: None) -> None:
    weight = weights(shape)
    before = weight.clone()
    expected, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    found, absmax = codes.quantize_int8(weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(absmax, scales, atol=0, rtol=0)
    assert torch.equal(weight, before)
