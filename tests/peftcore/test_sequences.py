"""Attention of short sequences against torch's own, each sequence by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftcore.ops.sequences import attend_short, kernels_attend

LENGTHS = [[1], [17], [5, 1, 33, 16], [64, 2]]


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(
    rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, laid_out: str
) -> list[Tensor]:
    """As models have them: the heads of a row together, or the rows of a head."""
    made = []
    for n in (heads[0], heads[1], heads[1]):
        if laid_out == "by row":
            t = torch.randn(1, rows, n, dim).to(dtype).transpose(1, 2)
        else:
            t = torch.randn(1, n, rows, dim).to(dtype)
        made.append(t.detach().requires_grad_())
    return made


def spans_of(lengths: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def by_torch(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    pieces = [
        F.scaled_dot_product_attention(
            *(t[:, :, start:end].float() for t in (q, k, v)),
            is_causal=True, scale=scale, enable_gqa=True,
        )
        for start, end in spans_of(lengths)
    ]  # fmt: skip
    return torch.cat(pieces, dim=2).transpose(1, 2).to(q.dtype)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [((1, 1), 16), ((6, 2), 48), ((9, 3), 64)])
@pytest.mark.parametrize("laid_out", ["by row", "by head"])
def test_results_and_gradients_are_torchs(
    lengths: list[int], dtype: torch.dtype, heads: tuple[int, int], dim: int, laid_out: str
) -> None:
    torch.manual_seed(0)
    given = operands(sum(lengths), heads, dim, dtype, laid_out)
    assert kernels_attend(*given)
    got = attend_short(*given, spans_of(lengths), 0.2)
    expected = by_torch(*given, lengths, 0.2)
    upstream = torch.randn(got.shape).to(dtype)
    atol, rtol = (2e-5, 1e-5) if dtype == torch.float32 else (0.05, 0.02)
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)
    for one, other in zip(
        torch.autograd.grad(got, given, upstream),
        torch.autograd.grad(expected, given, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_shows_and_stays_in_its_sequence(which: int, value: float) -> None:
    given = operands(20, (4, 2), 16, torch.float32, "by row")
    with torch.no_grad():
        given[which][:, :, 8] = value
    out = attend_short(*given, [(0, 4), (4, 12), (12, 20)], 0.25)
    finite = out.isfinite().all(dim=-1).all(dim=-1)[0]
    assert finite[:8].all()
    assert not finite[8]
    assert finite[12:].all()
    upstream = torch.ones_like(out)
    for grad in torch.autograd.grad(out, given, upstream):
        rows = grad.isfinite().all(dim=-1).all(dim=1)[0]
        assert rows[:4].all()
        assert rows[12:].all()


def test_a_sequence_is_what_it_is_alone_bit_by_bit() -> None:
    given = operands(50, (9, 3), 64, torch.bfloat16, "by row")
    upstream = torch.randn(1, 50, 9, 64).bfloat16()
    spans = [(0, 17), (17, 49), (49, 50)]
    together = attend_short(*given, spans, 0.125)
    grads = torch.autograd.grad(together, given, upstream)
    for start, end in spans:
        own = [t[:, :, start:end].detach().requires_grad_() for t in given]
        alone = attend_short(*own, [(0, end - start)], 0.125)
        assert torch.equal(alone, together[:, start:end])
        for one, all_ in zip(
            torch.autograd.grad(alone, own, upstream[:, start:end]), grads, strict=True
        ):
            assert torch.equal(one, all_[:, :, start:end])


def test_rows_of_no_sequence_give_zeros() -> None:
    given = operands(12, (2, 2), 16, torch.float32, "by head")
    out = attend_short(*given, [(2, 5), (6, 9)], 0.25)
    grads = torch.autograd.grad(out, given, torch.ones_like(out))
    for rows in (slice(0, 2), slice(5, 6), slice(9, 12)):
        assert not out[:, rows].any()
        assert not any(grad[:, :, rows].any() for grad in grads)
