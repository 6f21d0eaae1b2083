"""Gradients through `QuantLinear` against `F.linear` on the weight that its codes stand for."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peftcore.quant import QuantLinear, linear

Choice = Literal["nf4", "int8"]
CHOICES: list[Choice] = ["nf4", "int8"]


def layer_of(choice: Choice, out: int, width: int, bias: bool = True) -> QuantLinear:
    generator = torch.Generator().manual_seed(out + width)
    weight = torch.randn(out, width, generator=generator)
    return QuantLinear(weight, torch.randn(out, generator=generator) if bias else None, choice)


@pytest.fixture(params=[None, 64 * 64], ids=["one-tile", "many-tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(linear, "_TILE_ELEMENTS", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (200, 64), (96, 192), (130, 40)])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (1,)])
def test_outputs_and_gradients_are_those_of_the_dequantized_weight(
    choice: Choice, dtype: torch.dtype, shape: tuple[int, int], lead: tuple[int, ...]
) -> None:
    layer = layer_of(choice, *shape)
    x = torch.randn(*lead, shape[1]).to(dtype).requires_grad_()
    upstream = torch.randn(*lead, shape[0]).to(dtype)
    y = layer(x)
    y.backward(upstream)
    wanted = x.detach().float().requires_grad_()
    assert layer.bias is not None
    expected = F.linear(wanted, layer.dequantize(), layer.bias)
    expected.backward(upstream.float())
    assert y.dtype == x.dtype
    assert x.grad is not None
    assert wanted.grad is not None
    tolerance = (
        {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.2, "rtol": 0.02}
    )
    torch.testing.assert_close(y.float(), expected, **tolerance)
    torch.testing.assert_close(x.grad.float(), wanted.grad, **tolerance)
    if dtype is torch.float32:
        with torch.inference_mode():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_multiplied_in_its_own_type_where_that_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training; without gradients it is multiplied in float32 everywhere."""
    monkeypatch.setattr(linear, "_bfloat16_is_fast", lambda: fast)
    layer = layer_of("nf4", 512, 256)
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    weight = layer.dequantize()
    assert layer.bias is not None
    exact = F.linear(x.float(), weight).add_(layer.bias).bfloat16()
    rounded = F.linear(x, weight.bfloat16()).add_(layer.bias)
    assert (rounded == exact).float().mean() < 0.95
    # A sum in another order may round to the neighbour, in a few of the values.
    assert (layer(x) == (rounded if fast else exact)).float().mean() > 0.99
    with torch.no_grad():
        assert (layer(x) == exact).float().mean() > 0.99


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_nothing_of_the_weights_size_is_kept(choice: Choice, requires_grad: bool) -> None:
    layer = layer_of(choice, 512, 256, bias=False)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(3, 256, requires_grad=requires_grad)
        y = layer(x)
    assert y.requires_grad == requires_grad
    assert sum(saved) == 0


@pytest.mark.parametrize("choice", CHOICES)
def test_two_layers_in_a_row_share_the_scratch_buffer(choice: Choice) -> None:
    """Each pass overwrites the tiles that the other layer used."""
    first, second = layer_of(choice, 128, 64), layer_of(choice, 64, 128)
    x = torch.randn(5, 64, requires_grad=True)
    second(first(x).relu()).sum().backward()
    wanted = x.detach().clone().requires_grad_()
    hidden = F.linear(wanted, first.dequantize(), first.bias).relu()
    F.linear(hidden, second.dequantize(), second.bias).sum().backward()
    assert x.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(x.grad, wanted.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_output_may_be_changed_in_place(choice: Choice) -> None:
    """Adapters add to it."""
    layer = layer_of(choice, 64, 64)
    x = torch.randn(3, 64, requires_grad=True)
    delta = torch.randn(3, 64, requires_grad=True)
    layer(x).add_(delta).sum().backward()
    assert x.grad is not None
    assert delta.grad is not None
    assert torch.equal(delta.grad, torch.ones(3, 64))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_second_derivative_is_refused(choice: Choice) -> None:
    layer = layer_of(choice, 64, 64)
    x = torch.randn(3, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
