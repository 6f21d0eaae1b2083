"""Trained updates and scales by Triton: results and gradients against autograd in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.ops import VARIABLE
from peftcore.ops.trained import TrainedPart, adapted, plain

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: (rows, rank, with a scale, with inputs of its own) of parts that lie one after another.
Shape = tuple[int, int, bool, bool]
EVERY_RANK: list[Shape] = [
    (1, 1, False, False), (3, 2, True, False), (0, 7, True, False), (33, 8, False, True),
    (1, 15, True, True), (2, 16, False, False), (18, 17, True, False), (0, 33, False, True),
    (1, 33, False, False), (5, 64, True, False), (70, 100, False, False), (9, 128, True, True),
    (4, 0, True, False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _by_triton(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    shapes: Sequence[Shape], width: int, out: int, dtype: torch.dtype, gap: int = 0
) -> list[TrainedPart]:
    """Parts on the CPU, `gap` rows of the base between each two."""
    parts, start = [], gap
    for i, (num, rank, scaled, own) in enumerate(shapes):
        has = bool(rank)
        parts.append(
            TrainedPart(
                start,
                start + num,
                randn(rank, width, seed=i) if has else None,
                randn(out, rank, seed=i + 1) if has else None,
                0.5 + rank / 100,
                randn(out, seed=i + 2) if scaled else None,
                randn(num, width, seed=i + 3).to(dtype) if has and own else None,
            )
        )
        start += num + gap
    return parts


def leaves(parts: Sequence[TrainedPart]) -> list[Tensor]:
    return [t for p in parts for t in (p.a, p.b, p.v, p.own) if t is not None]


def map_tensors(parts: Sequence[TrainedPart], change: Any) -> list[TrainedPart]:
    return [
        TrainedPart(*(change(value) if isinstance(value, Tensor) else value for value in part))
        for part in parts
    ]


def computed(
    weight: Tensor, x: Tensor, parts: Sequence[TrainedPart], upstream: Tensor, device: torch.device
) -> tuple[list[TrainedPart], list[Tensor | None]]:
    """y, x's gradient and those of the parts' tensors, by `adapted` over a linear module."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(device, x.dtype)
    base.weight = nn.Parameter(weight.to(device), requires_grad=False)
    moved = map_tensors(parts, lambda t: t.detach().to(device).requires_grad_())
    x = x.detach().to(device).requires_grad_()
    y = adapted(base, x, moved)
    given = upstream.to(device)
    before = given.clone()
    grads = torch.autograd.grad(y, [x, *leaves(moved)], given, allow_unused=True)
    assert torch.equal(given, before), "the gradient that is given stays as it is"
    return moved, [y.detach().cpu(), *(None if g is None else g.cpu() for g in grads)]


def exact(
    weight: Tensor, x: Tensor, parts: Sequence[TrainedPart], upstream: Tensor
) -> list[Tensor | None]:
    """The same by torch in float64."""
    wide = map_tensors(parts, lambda t: t.detach().double().requires_grad_())
    x = x.detach().double().requires_grad_()
    y = plain(x @ weight.double().t(), x, wide)
    grads = torch.autograd.grad(y, [x, *leaves(wide)], upstream.double(), allow_unused=True)
    return [y.detach(), *grads]


def assert_close(
    found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float
) -> None:
    for one, other in zip(found, wanted, strict=True):
        if other is None:
            assert one is None or not one.any()
            continue
        assert one is not None
        assert one.shape == other.shape
        if other.numel():
            error = (one.double() - other).abs().max().item()
            assert error <= tolerance * other.abs().max().item(), (tuple(one.shape), error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_and_kind_in_one_batch(device: torch.device, dtype: torch.dtype) -> None:
    """Ranks 1 to 128, odd widths, empty parts, one row and several blocks, rows of the base
    between them, inputs and outputs that are split."""
    wide = [(1100, 20), (20, 1030)] if dtype == torch.float32 else []
    for width, out in [(33, 17), *wide]:
        parts = make(EVERY_RANK if width == 33 else EVERY_RANK[3:7], width, out, dtype, gap=1)
        rows = parts[-1].end + 1
        weight = randn(out, width, seed=1).to(dtype)
        x, upstream = randn(rows, width, seed=2).to(dtype), randn(rows, out, seed=3).to(dtype)
        _, found = computed(weight, x, parts, upstream, device)
        assert found[0] is not None
        assert found[0].dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        assert_close(found, exact(weight, x, parts, upstream), tolerance)


def test_sums_over_many_rows_are_made_in_chunks(
    device: torch.device, count_launches: Callable[[Any], Counter[str]]
) -> None:
    """Parts of several chunks, one that has just one, one of several groups of ranks; in three
    launches more."""
    from peftcore.ops.triton import trained

    launches = count_launches(trained)
    shapes = [(600, 3, True, False), (512, 2, True, False), (530, 20, False, True)]
    parts = make([*shapes, (1030, 0, True, False)], 10, 12, torch.float32)
    rows = parts[-1].end
    weight = randn(12, 10, seed=1)
    x, upstream = randn(rows, 10, seed=2), randn(rows, 12, seed=3)
    _, found = computed(weight, x, parts, upstream, device)
    assert_close(found, exact(weight, x, parts, upstream), 3e-6)
    assert launches.total() == 2 + 5 + 3


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_parts(
    device: torch.device, count: int, count_launches: Callable[[Any], Counter[str]]
) -> None:
    """In two launches and five."""
    from peftcore.ops.triton import trained

    launches = count_launches(trained)
    parts = make([(1, 1 + i % 8, i % 3 == 0, False) for i in range(count)], 16, 8, torch.float32)
    weight = randn(8, 16, seed=1)
    x, upstream = randn(count, 16, seed=2), randn(count, 8, seed=3)
    _, found = computed(weight, x, parts, upstream, device)
    assert_close(found, exact(weight, x, parts, upstream), 2e-6)
    assert launches == {
        "shrink_kernel": 2, "expand_kernel": 2, "outer_kernel": 2, "scale_back_kernel": 1
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, on others' rows
def test_a_part_is_what_it_is_alone_bit_by_bit(device: torch.device) -> None:
    """Among others, at other rows, whatever their values: not even what is not finite gets out."""
    parts = make(EVERY_RANK[3:8], 70, 50, torch.float32)
    rows = parts[-1].end
    weight = randn(50, 70, seed=1)
    x, upstream = randn(rows, 70, seed=2), randn(rows, 50, seed=3)
    wanted = parts[3]  # no inputs of its own, a scale
    mine = slice(wanted.start, wanted.end)
    for other in (p for p in parts if p is not wanted):
        x[other.start : other.end] = torch.nan
        upstream[other.start : other.end] = torch.inf
        for tensor in leaves([other]):
            tensor.fill_(torch.nan)
    moved, found = computed(weight, x, parts, upstream, device)
    alone = [wanted._replace(start=0, end=wanted.end - wanted.start)]
    _, (y, grad_x, *grads) = computed(weight, x[mine], alone, upstream[mine], device)
    assert y is not None
    assert y.isfinite().all()
    first = 2 + len(leaves(moved[:3]))
    assert len(grads) == 3
    together = [found[0], found[1], *found[first : first + 3]]
    for one, other_ in zip(together[2:], grads, strict=True):
        assert one is not None
        assert torch.equal(one, other_)
    # The base's map is torch's, which may sum one row and many in other orders.
    assert_close([t[mine] for t in together[:2] if t is not None], [y, grad_x], 1e-6)


def test_strided_inputs_and_a_gradient_that_is_expanded(device: torch.device) -> None:
    parts = make([(4, 3, True, False), (6, 20, False, False)], 12, 9, torch.float32)
    weight = randn(9, 12, seed=1)
    wide = randn(24, 10, seed=2)
    x, upstream = wide[::2].t(), torch.ones(1, 1).expand(10, 9)
    _, found = computed(weight, x, parts, upstream, device)
    assert_close(found, exact(weight, x, parts, upstream), 2e-6)


def test_what_needs_no_gradient_gets_none(device: torch.device) -> None:
    """Frozen factors, and an input without a gradient; the others' are as before."""
    parts = make([(4, 3, True, False), (6, 20, True, True)], 12, 9, torch.float32)
    weight, x, upstream = randn(9, 12, seed=1), randn(10, 12, seed=2), randn(10, 9, seed=3)
    expected = exact(weight, x, parts, upstream)
    base = nn.Linear(12, 9, bias=False).to(device).requires_grad_(False)
    base.weight.copy_(weight)
    moved = map_tensors(parts, lambda t: t.detach().to(device))
    trained = leaves(moved)
    for tensor in trained[1::2]:
        tensor.requires_grad_()
    y = adapted(base, x.to(device), moved)
    grads = torch.autograd.grad(y, trained[1::2], upstream.to(device))
    assert_close([g.cpu() for g in grads], expected[3::2], 2e-6)


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    a, b = torch.zeros(2, 8), torch.zeros(4, 2)
    y, x = torch.zeros(3, 4), torch.zeros(3, 8)

    def refused(match: str, spans: Any, *given: Tensor | None, x: Tensor | None = x) -> None:
        with pytest.raises(ValueError, match=match):
            ops.adapt_(y, x, 8, spans, given)

    whole = [(0, 3, 1.0)]
    refused("part", [(0, 4, 1.0)], a, b, None, None)
    refused("part", [(1, 3, 1.0), (0, 2, 1.0)], a, b, None, None, a, b, None, None)
    refused("a:", whole, a[:, :7], b, None, None)
    refused("b:", whole, a, b.t(), None, None)
    refused("a:", whole, a.double(), b, None, None)
    refused("v:", whole, None, None, torch.zeros(5), None)
    refused("own:", whole, a, b, None, x[:2])
    refused("together", whole, a, None, None, None)
    refused("together", whole, a, b, None, None, x=None)


def test_nothing_is_launched_for_nothing(ops: Any) -> None:
    y, x = torch.ones(3, 4), torch.ones(3, 8)
    assert [len(kept) for kept in ops.adapt_(y, x, 8, [], [])] == [1, 0]
    ops.adapt_(y, x, 8, [(1, 1, 1.0)], [torch.ones(2, 8), torch.ones(4, 2), torch.ones(4), None])
    assert (y == 1).all()
