"""Quantized linears against bitsandbytes' own dequantization and torch's own matmul."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.base import BaseModel
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.quant import QuantLinear, linear, quantize_model
from tests import tiny

#: (out_features, in_features). Where in_features is no multiple of 64, blocks span rows; at 3 × 5
#: the last byte is half used; the last ones need more than one tile below.
SHAPES = [(64, 64), (48, 96), (7, 65), (3, 5), (1, 1), (130, 64), (200, 33), (257, 70)]


def dequantized(weight: Tensor, quantization: str) -> Tensor:
    """The weight that bitsandbytes' codes stand for, by the formats' definitions.

    Its own CPU dequantization of nf4 begins a new block at each row, unlike its quantization.
    """
    if quantization == "nf4":
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)
        scales = state.absmax.repeat_interleave(64)[: weight.numel()]
        return (state.code[codes[: weight.numel()].long()] * scales).view_as(weight)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    return codes.float() * scales.float().view(-1, 1) / 127


def random_layer(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of very different size: a scale taken from another row would show."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g) * torch.logspace(-2, 1, shape[0])[:, None]
    return weight, torch.randn(shape[0], generator=g)


#: Dequantized weights a tile; 6400 are a number of rows that is no multiple of a block.
TILE_ELEMENTS = {"one tile": linear._TILE_ELEMENTS, "many tiles": 64, "uneven tiles": 6400}


@pytest.fixture(params=["kernels", *TILE_ELEMENTS])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, or torch in tiles of a size."""
    if request.param == "kernels":
        assert kernels() is not None, kernels_status()
        return request.param
    monkeypatch.setattr(linear, "kernels", lambda: None)
    if request.param != "one tile":
        monkeypatch.setattr(linear, "_TILE_ELEMENTS", TILE_ELEMENTS[request.param])
        monkeypatch.setattr(linear, "_scratch", type(linear._scratch)())
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_computes_what_bitsandbytes_codes_say(
    shape: tuple[int, int], quantization: Any, with_bias: bool, tiles: str
) -> None:
    weight, bias = random_layer(shape)
    layer = QuantLinear(weight, bias if with_bias else None, quantization)
    expected = dequantized(weight, quantization)
    assert shape == (1, 1) or not torch.equal(expected, weight)
    torch.testing.assert_close(layer.dequantize(), expected, atol=0, rtol=1e-6)
    for x_shape in [(1,), (5,), (1, 1), (1, 5), (2, 3), (2, 2, 2)]:
        x = torch.randn(*x_shape, shape[1])
        y = layer(x)
        assert y.shape == (*x_shape, shape[0])
        torch.testing.assert_close(
            y, F.linear(x, expected, bias if with_bias else None), atol=1e-4, rtol=1e-4
        )


def test_many_tiles_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture does what it says."""
    monkeypatch.setattr(linear, "kernels", lambda: None)
    monkeypatch.setattr(linear, "_TILE_ELEMENTS", 64)
    weight, _ = random_layer((257, 70))
    layer = QuantLinear(weight, None, "nf4")
    columns = layer._columns
    calls: list[tuple[int, int]] = []

    def recording(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        calls.append((start, stop))
        return columns(start, stop, dtype)

    layer._columns = recording  # type: ignore[method-assign]
    layer(torch.randn(1, 70))
    assert calls == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 257)]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("x_shape", [(0,), (1, 0), (0, 4), (2, 0)])
def test_no_rows(quantization: Any, x_shape: tuple[int, ...], tiles: str) -> None:
    weight, bias = random_layer((130, 65))
    y = QuantLinear(weight, bias, quantization)(torch.empty(*x_shape, 65))
    assert y.shape == (*x_shape, 130)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_inputs_dtype(quantization: Any, dtype: torch.dtype, tiles: str) -> None:
    weight, bias = random_layer((130, 64))
    layer = QuantLinear(weight.to(dtype), bias, quantization)
    x = torch.randn(1, 3, 64).to(dtype)
    before = x.clone()
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    expected = F.linear(x.float(), dequantized(weight.to(dtype).float(), quantization), bias)
    torch.testing.assert_close(y.float(), expected.to(dtype).float(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_row_does_not_depend_on_its_neighbours(quantization: Any, tiles: str) -> None:
    """An outlier beside it changes nothing: activations are not quantized by the batch."""
    weight, bias = random_layer((130, 96))
    layer = QuantLinear(weight, bias, quantization)
    x = torch.randn(17, 96)
    x[3] *= 1e4
    together = layer(x[None])[0]
    for i in range(len(x)):
        alone = layer(x[None, i : i + 1])[0, 0]
        if tiles == "kernels" and layer.packed:
            assert torch.equal(alone, together[i])
        close = 1e-6 * float(together[i].abs().max())
        torch.testing.assert_close(alone, together[i], atol=close, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_flow_through(quantization: Any, tiles: str) -> None:
    """Through two layers that share this thread's tile: the base of an adapter in training."""
    layers = [random_layer((130, 64), 1)[0], random_layer((64, 130), 2)[0]]
    first, second = (QuantLinear(weight, None, quantization) for weight in layers)
    x, probe = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    (second(first(x)) * probe).sum().backward()
    expected = probe
    for weight in reversed(layers):
        expected = expected @ dequantized(weight, quantization)
    torch.testing.assert_close(x.grad, expected, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_inference_mode_leaves_no_trace(quantization: Any, tiles: str) -> None:
    """What one call leaves in this thread's scratch memory is usable by any other."""
    weight, _ = random_layer((64, 64))
    layer = QuantLinear(weight, None, quantization)
    x = torch.randn(2, 64)
    linear._scratch.__dict__.clear()
    with torch.inference_mode():
        inside = layer(x).clone()
    with torch.no_grad():
        outside = layer(x)
    assert torch.equal(inside, outside)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dequantize_is_fresh_memory(quantization: Any, tiles: str) -> None:
    """It outlives the next call, of this layer or another, and may be changed."""
    weight, _ = random_layer((130, 64))
    layer = QuantLinear(weight, None, quantization)
    first = layer.dequantize()
    expected = first.clone()
    QuantLinear(weight * 3, None, quantization)(torch.randn(1, 64))
    assert torch.equal(first, expected)
    first.zero_()
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantizing_leaves_the_weight(quantization: Any) -> None:
    weight, bias = random_layer((48, 96))
    before = weight.clone(), bias.clone()
    layer = QuantLinear(weight, bias, quantization)
    bias.zero_()  # its bias is its own
    assert torch.equal(weight, before[0])
    torch.testing.assert_close(layer(torch.zeros(1, 96))[0], before[1], atol=0, rtol=0)
    assert not [*layer.parameters()]
    assert layer.codes.element_size() == 1


def test_a_quantized_layer_is_small() -> None:
    weight, _ = random_layer((256, 256))
    nf4, int8 = (QuantLinear(weight, None, q) for q in ("nf4", "int8"))
    assert nf4.codes.numel() == 256 * 256 // 2
    assert nf4.absmax.numel() == 256 * 256 // 64
    assert int8.codes.numel() == 256 * 256
    assert int8.absmax.numel() == 256


@pytest.mark.parametrize("quantization", ["none", "fp4", "", "NF4"])
def test_another_quantization_is_refused(quantization: Any) -> None:
    with pytest.raises(ValueError, match="quantization"):
        QuantLinear(torch.randn(4, 4), None, quantization)


# -- whole models ------------------------------------------------------------------------------


def with_dequantized_weights(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """The model with each linear's weight replaced by what its codes stand for; the head's int8."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(dequantized(head.weight.detach(), "int8"))  # and no longer tied
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight = nn.Parameter(dequantized(module.weight.detach(), quantization))
        elif isinstance(module, Conv1D):
            weight = module.weight.detach().T.contiguous()
            module.weight = nn.Parameter(dequantized(weight, quantization).T.contiguous())
    return model


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3], ids=lambda m: m.__name__)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@torch.inference_mode()
def test_a_quantized_model(make: Any, quantization: Any, tiles: str) -> None:
    model = make()
    embedding = model.get_input_embeddings().weight.clone()
    expected_model = with_dequantized_weights(model, quantization)
    full = model(torch.arange(2, 40)[None]).logits
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    quantize_model(model, quantization)
    kinds = {
        name: m.quantization for name, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    assert list(kinds) == linears
    assert kinds.pop("lm_head") == "int8"
    assert set(kinds.values()) == {quantization}
    assert torch.equal(model.get_input_embeddings().weight, embedding)

    ids = torch.arange(2, 40)[None]
    expected, actual = expected_model(ids).logits, model(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
    assert (actual - full).abs().max() > 0.01  # it was quantized
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = expected_model.get_submodule(name).weight
            weight = (
                weight if isinstance(expected_model.get_submodule(name), nn.Linear) else weight.T
            )
            torch.testing.assert_close(module.dequantize(), weight, atol=0, rtol=1e-6)


def test_no_quantization_is_no_change() -> None:
    model = tiny.llama()
    before = dict(model.named_modules())
    quantize_model(model, "none")
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_see_the_dequantized_weight(quantization: Any) -> None:
    """`BaseModule.weight` and `bias` of a quantized, a Conv1D and a plain module: y = W x + b."""
    for make in (tiny.llama, tiny.gpt2):
        plain, quantized = make(), make()
        quantize_model(quantized, quantization)
        for model in (plain, quantized):
            base = BaseModel.from_model(model)
            for module in base.modules.values():
                if module.is_linear:
                    weight, bias = module.weight(), module.bias()
                    assert weight.shape == (module.out_features, module.in_features)
                    assert weight.dtype == torch.float32
                    x = torch.randn(2, module.in_features)
                    torch.testing.assert_close(
                        F.linear(x, weight, bias), module.module(x), atol=1e-4, rtol=1e-4
                    )
        assert (
            BaseModel.from_model(plain).modules.keys()
            == BaseModel.from_model(quantized).modules.keys()
        )
