"""The kernels' updates and scales with gradients against torch's, which gradcheck covers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.ops import VARIABLE
from peftcore.ops.cpu import kernels
from peftcore.ops.trained import TrainedPart, adapted, plain, plain_row_norms, row_norms
from peftcore.quant import QuantLinear

#: (start, end, rank, with a scale, with inputs of its own) of each part, over 37 rows.
BATCHES: dict[str, list[tuple[int, int, int, bool, bool]]] = {
    "one": [(0, 37, 8, False, False)],
    "ranks": [(0, 9, 1, False, False), (9, 10, 17, True, False), (10, 37, 33, False, False)],
    "gaps": [(2, 7, 4, True, False), (20, 36, 8, False, True)],
    "scales": [(0, 13, 0, True, False), (13, 37, 16, True, True)],
    "empty": [(0, 0, 8, True, False), (5, 30, 3, True, False)],
    "out of order": [(20, 37, 5, True, False), (0, 20, 2, False, False)],
}


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def parts_of(name: str, out: int, width: int, dtype: torch.dtype) -> list[TrainedPart]:
    generator = torch.Generator().manual_seed(len(name))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        TrainedPart(
            start,
            end,
            random(rank, width).requires_grad_() if rank else None,
            random(out, rank).requires_grad_() if rank else None,
            0.5 + rank / 8,
            random(out).requires_grad_() if scaled else None,
            random(end - start, width).to(dtype).requires_grad_() if own else None,
        )
        for start, end, rank, scaled, own in BATCHES[name]
    ]


def leaves(parts: list[TrainedPart]) -> list[Tensor]:
    return [t for p in parts for t in (p.a, p.b, p.v, p.own) if t is not None]


def gradients(y: Tensor, upstream: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    found = torch.autograd.grad(y, of, upstream, allow_unused=True)
    return list(found)


def compare(got: Any, wanted: Any, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(got, wanted, strict=True):
        if other is None or not other.numel():
            continue
        one, other = one.detach(), other.detach()
        bound = tolerance * float(other.abs().max())
        torch.testing.assert_close(one, other, atol=bound, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("out", "width"), [(48, 64), (130, 40), (5, 7)])
@pytest.mark.parametrize("quantized", [False, True])
def test_outputs_and_gradients_are_torchs(
    name: str, dtype: torch.dtype, out: int, width: int, quantized: bool
) -> None:
    assert kernels() is not None
    torch.manual_seed(1)
    base: nn.Module = nn.Linear(width, out).to(dtype).requires_grad_(False)
    if quantized:
        base = QuantLinear(torch.randn(out, width), torch.randn(out), "int8")
    parts = parts_of(name, out, width, dtype)
    x = torch.randn(37, width).to(dtype).requires_grad_()
    upstream = torch.randn(37, out).to(dtype)
    of = [x, *leaves(parts)]
    y, wanted = adapted(base, x, parts), plain(base(x), x, parts)
    assert y.dtype == dtype
    compare([y], [wanted], dtype)
    compare(gradients(y, upstream, of), gradients(wanted, upstream, of), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_what_it_is_alone_bit_by_bit(dtype: torch.dtype) -> None:
    parts = parts_of("ranks", 130, 40, dtype)
    base = nn.Linear(40, 130).to(dtype).requires_grad_(False)
    y, x = torch.randn(37, 130).to(dtype), torch.randn(37, 40).to(dtype).requires_grad_()
    upstream = torch.randn(37, 130).to(dtype)

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return y.clone() + (base(x) * 0 if x.requires_grad else 0)

    together = adapted(Given(), x, parts)
    grads = gradients(together, upstream, leaves(parts))
    for part in parts:
        alone = adapted(Given(), x, [part])
        assert torch.equal(alone[part.start : part.end], together[part.start : part.end])
        for grad in gradients(alone, upstream, leaves([part])):
            assert any(torch.equal(grad, g) for g in grads if g.shape == grad.shape)


def test_what_is_not_finite_stays_in_its_part() -> None:
    first, second = parts_of("scales", 48, 64, torch.float32)
    base = QuantLinear(torch.randn(48, 64), None, "nf4")
    x = torch.randn(37, 64)
    x[:13] = torch.nan
    upstream = torch.randn(37, 48)
    upstream[:13] = torch.inf
    x.requires_grad_()
    y = adapted(base, x, [first, second])
    grads = gradients(y, upstream, [x, *leaves([second])])
    assert y[13:].isfinite().all()
    assert grads[0] is not None
    assert grads[0][13:].isfinite().all()
    assert all(g is not None and g.isfinite().all() for g in grads[1:])


def test_the_gradient_that_is_given_stays_as_it_is() -> None:
    parts = parts_of("scales", 48, 64, torch.float32)
    upstream = torch.randn(37, 48)
    before = upstream.clone()
    x = torch.randn(37, 64, requires_grad=True)
    gradients(adapted(nn.Linear(64, 48), x, parts), upstream, leaves(parts))
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("case", ["float64", "overlapping", "autocast", "no kernels"])
def test_torch_computes_what_the_kernels_do_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if case == "float64" else torch.float32
    parts = parts_of("scales", 48, 64, dtype)
    if case == "float64":
        parts = [p._replace(v=p.v.to(dtype)) for p in parts if p.v is not None and p.a is None]
    if case == "overlapping":
        parts += parts_of("one", 48, 64, dtype)
    if case == "no kernels":
        monkeypatch.setenv(VARIABLE, "torch")
    base = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    x = torch.randn(37, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(adapted(base, x, parts), plain(base(x), x, parts))


@pytest.mark.parametrize(("rank", "width", "out"), [(1, 7, 5), (8, 64, 48), (33, 40, 130)])
def test_row_norms_are_those_of_the_changed_weight(rank: int, width: int, out: int) -> None:
    a, b = torch.randn(rank, width), torch.randn(out, rank)
    weight = torch.randn(out, width)
    given = (a, b, a @ weight.t(), weight.square().sum(dim=1), 0.7)
    expected = (weight + 0.7 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(*given), expected)
    torch.testing.assert_close(plain_row_norms(*given), expected)


def test_a_row_that_is_not_finite_has_no_norm() -> None:
    a, b = torch.randn(2, 8), torch.randn(3, 2)
    b[1, 0] = torch.nan
    found = row_norms(a, b, a @ torch.ones(8, 3), torch.full((3,), 8.0), 1.0)
    assert found.isnan().tolist() == [False, True, False]
