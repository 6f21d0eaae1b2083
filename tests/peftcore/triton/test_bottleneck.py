"""Bottlenecks by Triton: against torch in float64, and against AdapterHub's `adapters`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore import PeftModel
from peftcore.ops import VARIABLE
from peftcore.ops.bottleneck import BottleneckPart, activation, post_norm, pre_norm
from peftcore.primitives import Bottleneck
from tests.peftcore import make_adapterhub_fixtures as original
from tests.peftcore.hub import hub

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VALUES = ["branch", "stream", "sum", "normed"]


@pytest.fixture
def by_triton(
    ops: Any, count_launches: Callable[[Any], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Has Triton compute; the launches of each kernel."""
    from peftcore.ops.triton import bottleneck

    monkeypatch.setenv(VARIABLE, "triton")
    return count_launches(bottleneck)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(width: int, dim: int, seed: int = 0, norm: bool = False, **options: Any) -> Bottleneck:
    """Of values that leave an activation where it bends."""
    made: dict[str, Any] = {"activation": "relu", "reads": "branch", "keeps": "branch"} | options
    if norm:
        made["norm_weight"], made["norm_bias"] = randn(dim, seed=seed + 4), randn(dim, seed=seed)
    return Bottleneck(
        "module",
        None,
        randn(width, dim, seed=seed) / dim**0.5,
        randn(width, seed=seed + 1),
        randn(dim, width, seed=seed + 2) / width**0.5,
        randn(dim, seed=seed + 3),
        **made,
    )


def cast(p: Bottleneck, device: torch.device, dtype: torch.dtype) -> Bottleneck:
    changes = {
        f.name: getattr(p, f.name).to(device, dtype)
        for f in dataclasses.fields(p)
        if isinstance(getattr(p, f.name), Tensor)
    }
    return dataclasses.replace(p, **changes)


class Rows:
    """A branch and its stream, and parts on them, by Triton and by torch in float64."""

    def __init__(
        self,
        parts: Sequence[tuple[int, Bottleneck]],
        dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """parts: numbers of rows; a row of the base comes before each."""
        self.device, self.dtype = device, dtype
        self.places, start = [], 1
        for num, p in parts:
            self.places.append((start, start + num, cast(p, torch.device("cpu"), dtype)))
            start += num + 1
        self.branch, self.stream = (randn(start, dim, seed=i).to(dtype) for i in (8, 9))
        self.norm = nn.LayerNorm(dim).requires_grad_(False)
        self.norm.weight.copy_(randn(dim, seed=10))

    def _parts(self, device: torch.device, dtype: torch.dtype) -> list[BottleneckPart]:
        return [BottleneckPart(s, e, cast(p, device, dtype)) for s, e, p in self.places]

    def pre(self, wide: bool) -> Tensor:
        device, dtype = (torch.device("cpu"), torch.float64) if wide else (self.device, self.dtype)
        y, r = (t.to(device, dtype) for t in (self.branch, self.stream))
        return pre_norm(y, r, self._parts(device, dtype)).cpu()

    def post(self, wide: bool) -> Tensor:
        device, dtype = (torch.device("cpu"), torch.float64) if wide else (self.device, self.dtype)
        h, r = (t.to(device, dtype)[None] for t in (self.branch, self.stream))
        norm = self.norm.to(device, dtype)
        return post_norm(h, r, norm, self._parts(device, dtype))[0].cpu()

    def check(self, monkeypatch: pytest.MonkeyPatch, tolerance: float, **kinds: bool) -> None:
        for compute in [self.pre] * kinds.get("pre", True) + [self.post] * kinds.get("post", True):
            with torch.inference_mode():
                found = compute(wide=False)
            with monkeypatch.context() as patch:
                patch.setenv(VARIABLE, "torch")
                expected = compute(wide=True)
            assert found.dtype == self.dtype
            size = expected.abs().max().item()
            error = (found.double() - expected).abs().max().item()
            assert error <= tolerance * size, (compute.__name__, error / size)


def test_every_width_and_mode_in_one_batch(
    by_triton: Counter[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths 1 to 128, what is read and kept, norms before and after, both ends; empty parts, one
    row and several blocks."""
    for dim in (33, 1030):
        parts, i = [], 0
        for width, num in [(1, 1), (7, 18), (16, 0), (17, 3), (64, 1), (128, 2)]:
            for norm, in_norm in [(False, False), (True, False), (True, True)]:
                i += 1
                if dim > 1000 and i not in (2, 5, 16, 18):
                    continue
                p = weights(
                    width, dim, seed=i, norm=norm, keeps_in_norm=in_norm, reads=VALUES[i % 3],
                    keeps=VALUES[(i // 3) % 3], closes=i % 2 == 0, normalizes=i % 5 < 2,
                )  # fmt: skip
                parts.append((num, p))
        Rows(parts, dim, device).check(monkeypatch, 2e-6)
    assert by_triton == {"down_kernel": 6, "up_kernel": 6, "norm_kernel": 6}
    parts = [(2, weights(4, 20, reads="normed")), (3, weights(9, 20, keeps="normed", closes=False))]
    Rows(parts, 20, device).check(monkeypatch, 2e-6, pre=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_and_rows_that_do_not_lie_together(
    by_triton: Counter[str],
    device: torch.device,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = [(3, weights(20, 40, keeps="sum")), (18, weights(5, 40, norm=True, normalizes=True))]
    rows = Rows(parts, 40, device, dtype)
    rows.check(monkeypatch, 4 * torch.finfo(dtype).eps)
    assert by_triton["down_kernel"] == 2
    rows.branch, rows.stream = (t.t().contiguous().t() for t in (rows.branch, rows.stream))
    rows.check(monkeypatch, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "name",
    ["linear", "relu", "leakyrelu", "leaky_relu", "silu", "swish", "gelu", "gelu_new", "gelu_fast",
     "gelu_accurate", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh", "tanh", "sigmoid",
     "quick_gelu"],
)  # fmt: skip
def test_activations(
    by_triton: Counter[str], device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ordinary values, and far out, where an exponential would overflow."""
    p = weights(16, 16, activation=name, keeps="stream")
    rows = Rows([(9, p)], 16, device)
    rows.branch[5:] *= 300
    rows.check(monkeypatch, 2e-6, post=False)
    assert by_triton == {"down_kernel": 1, "up_kernel": 1}


def test_what_the_kernels_do_not_know_is_torchs(
    by_triton: Counter[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another activation, dropout in training, and wherever gradients may be wanted."""
    assert activation("hardswish")
    rows = Rows([(2, weights(4, 8)), (2, weights(4, 8, activation="hardswish"))], 8, device)
    rows.check(monkeypatch, 1e-6)
    known = [BottleneckPart(0, 2, cast(weights(4, 8), device, torch.float32))]
    x = randn(4, 8, seed=1).to(device)
    with torch.no_grad():
        pre_norm(x, x, [known[0]._replace(dropout=nn.Dropout(0.5).train())])
    given = x.clone().requires_grad_()
    pre_norm(given, x, known).sum().backward()
    assert given.grad is not None
    assert not by_triton
    with torch.no_grad():
        pre_norm(x, x, [known[0]._replace(dropout=nn.Dropout(0.5).eval())])
    assert by_triton


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, on others' rows
def test_rows_of_others_do_not_matter(by_triton: Counter[str], device: torch.device) -> None:
    """To the bit, and not even where they are not finite."""
    ps = [weights(3 + i, 24, seed=i, norm=i % 2 == 0, normalizes=i == 1) for i in range(3)]
    rows = Rows([(2, ps[0]), (5, ps[1]), (2, ps[2])], 24, device)
    start, end, p = rows.places[1]
    rows.branch[:start] = torch.nan
    rows.stream[end:] = torch.inf
    with torch.inference_mode():
        together = rows.pre(wide=False)[start:end]
        given = [t[start:end].to(device).contiguous() for t in (rows.branch, rows.stream)]
        alone = pre_norm(*given, [BottleneckPart(0, end - start, cast(p, device, rows.dtype))])
    assert together.isfinite().all()
    assert torch.equal(together, alone.cpu())


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_parts(
    by_triton: Counter[str], device: torch.device, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two launches."""
    parts = [(1, weights(1 + i % 7, 8, seed=i, keeps="stream")) for i in range(count)]
    Rows(parts, 8, device).check(monkeypatch, 2e-6, post=False)
    assert by_triton == {"down_kernel": 1, "up_kernel": 1}


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    from peftcore.ops.triton.bottleneck import Segment, bottlenecks_

    def refused(match: str, *segments: Segment, **changed: Tensor | None) -> None:
        x = torch.zeros(4, 8)
        given = {"out": x.clone(), "branch": x, "stream": x, "normed": None} | changed
        with pytest.raises(ValueError, match=match):
            bottlenecks_(**given, segments=segments, epsilon=1e-5)

    p = weights(3, 8)
    refused("beyond", Segment(2, 5, p, 0.0))
    refused("width", Segment(0, 2, weights(3, 9), 0.0))
    refused("not given", Segment(0, 2, p, -1.0), stream=None)
    refused("not given", Segment(0, 2, weights(3, 8, reads="normed"), 0.0))
    refused("beside", Segment(0, 2, p, 0.0), stream=torch.zeros(3, 8))
    refused("contiguous", Segment(0, 2, p, 0.0), branch=torch.zeros(8, 4).t())
    refused("not know", Segment(0, 2, weights(3, 8, activation="mish"), 0.0))


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_adapterhubs_adapters_give_its_results(
    by_triton: Counter[str], device: torch.device, model: str, tmp_path: Path
) -> None:
    world = hub(model)
    inputs = {k: v.to(device) for k, v in original.batch(model).items() if k != "labels"}
    for case in world.cases:
        base = world.base().to(device)
        loaded = PeftModel.from_pretrained(base, world.save(case, tmp_path / case))
        with torch.no_grad():
            found = loaded(**inputs)
        got = found.logits if "logits" in found else found.last_hidden_state
        torch.testing.assert_close(got.cpu(), world.expected(case), atol=3e-5, rtol=0)
    assert by_triton
