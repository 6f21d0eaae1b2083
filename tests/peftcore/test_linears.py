"""Linear modules with adapters, each case by torch and by the kernels, against dense matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore import layers
from peftcore.layers import AdapterBatch, AdapterHost, AdapterLinear, Segment, linears
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.packing import BoundAdapter, bind, pack
from peftcore.primitives import (
    BiasDelta,
    Bottleneck,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    ModulePrimitive,
    OutputScale,
    Primitive,
    RowOverride,
)
from peftcore.program import AdapterProgram
from peftcore.quant import QuantLinear
from tests.peftcore.test_quant import dequantized

N_IN, N_OUT = 24, 20

#: Where an adapter's low-rank updates, scales and biases are computed. What else there is, torch
#: computes either way.
WAYS = ["torch", "kernels"]
KINDS = ["linear", "no bias", "conv1d", "nf4", "int8", "odd nf4"]
#: Those whose bases the kernels multiply.
PACKED = ["nf4", "int8"]

#: Bottlenecks act on a branch of a layer: `test_bottleneck` has them.
PRIMITIVES = [cls for cls in get_args(ModulePrimitive) if cls is not Bottleneck]
SIMPLE = [LowRank, InputScale, OutputScale, BiasDelta]

#: What acts on a row: adapters' primitives and weights.
Parts = Sequence[tuple[Sequence[Primitive], float]]


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


@dataclass
class Base:
    """A module, and what it computes as a dense matrix: bitsandbytes' codes dequantized."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def make(cls, kind: str, n_in: int = N_IN, n_out: int = N_OUT, seed: int = 0) -> Base:
        torch.manual_seed(seed)
        weight, bias = torch.randn(n_out, n_in), torch.randn(n_out)
        if kind in ("linear", "no bias"):
            linear = nn.Linear(n_in, n_out, bias=kind == "linear")
            return cls(linear, linear.weight.detach().double(), _exact(linear.bias))
        if kind == "conv1d":
            conv = Conv1D(n_out, n_in)
            conv.bias.data.copy_(bias)
            return cls(conv, conv.weight.detach().T.double(), bias.double())
        quantization: Any = kind.removeprefix("odd ")
        given = None if kind == "int8" else bias
        quantized = QuantLinear(weight, given, quantization)
        assert quantized.packed == (kind in PACKED)
        return cls(quantized, dequantized(weight, quantization).double(), _exact(given))

    @property
    def n_in(self) -> int:
        return self.weight.shape[1]

    def adapter(
        self, seed: int, *only: type[Primitive], rank: int = 4, path: str = "m"
    ) -> list[Primitive]:
        """Everything that an adapter may do here, or only the classes that are given."""
        g = torch.Generator().manual_seed(seed)
        n_out, n_in = self.weight.shape

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        size = next(size for size in (4, 5) if n_in % size == 0)
        everything: list[Primitive] = [
            LowRank(path, noise(rank, n_in), noise(n_out, rank), 0.75),
            InputScale(path, noise(n_in)),
            OutputScale(path, noise(n_out)),
            BiasDelta(path, noise(n_out)),
            # Row vectors times blocks: not symmetric, so that the other orientation differs.
            InputRotation(path, torch.linalg.qr(noise(n_in // size, size, size)).Q),
            ModuleOverride(path, noise(n_out, n_in), noise(n_out) if seed % 2 else None),
            RowOverride(path, (n_out - 3, 0, 5), noise(3, n_in)),
        ]
        return [p for p in everything if not only or type(p) in only]

    def bound(self, primitives: Sequence[Primitive], way: str) -> BoundAdapter:
        return bound(primitives, way, m=self)

    def formula(self, x: Tensor, parts: Parts) -> Tensor:
        """One row, as `peftcore.primitives` states it, in float64."""

        def each(cls: type[Any]) -> Iterator[tuple[Any, float]]:
            return ((p, weight) for given, weight in parts for p in given if type(p) is cls)

        x = x.double()
        for p, _ in each(InputRotation):
            x = x @ torch.block_diag(*p.blocks.double())
        for p, _ in each(InputScale):
            x = x * p.v
        y = self.weight @ x + (0 if self.bias is None else self.bias)
        for p, _ in each(ModuleOverride):
            y = p.weight.double() @ x + (0 if p.bias is None else p.bias)
        for p, weight in each(LowRank):
            y = y + weight * p.scale * (p.b.double() @ (p.a.double() @ x))
        for p, _ in each(OutputScale):
            y = y * p.v
        for p, weight in each(BiasDelta):
            y = y + weight * p.b
        for p, _ in each(RowOverride):
            for i, row in zip(p.ids, p.rows, strict=True):
                y[i] = row.double() @ x + (0 if self.bias is None else self.bias[i])
        return y


def base_of(kind: str) -> Base:
    """The kernels cannot read the codes of an odd one: there torch multiplies."""
    return Base.make(kind, n_in=25 if kind.startswith("odd") else N_IN)


def bound(primitives: Sequence[Primitive], way: str, **bases: Base) -> BoundAdapter:
    """Through a buffer, as the server has it.  bases: path → the module there."""
    packed = pack(AdapterProgram("d", "ANY", primitives), torch.float32)
    if way == "torch":
        return bind("d", packed.layout, packed.data, 0)
    assert kernels() is not None, kernels_status()
    sizes = {path: (base.n_in, len(base.weight)) for path, base in bases.items()}
    return bind("d", packed.layout, packed.data, 0, sizes)


def assert_row(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "classes",
    [*([cls] for cls in PRIMITIVES), SIMPLE, PRIMITIVES],
    ids=lambda classes: "+".join(cls.__name__ for cls in classes),
)
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_rows_of_a_segment_get_its_primitives(
    way: str, kind: str, classes: list[type[Primitive]], folded: bool
) -> None:
    """Rows of the base, of an adapter, of a mixture of two, and of one that is not here."""
    base, host = base_of(kind), AdapterHost()
    layer = AdapterLinear(base.module, "m", host)
    first, second = base.adapter(1, *classes), base.adapter(2, *classes, rank=7)
    a, b = base.bound(first, way), base.bound(second, way)
    by_kernels = way == "kernels" and set(classes) <= set(SIMPLE)
    for adapter in (a, b):
        assert (adapter.kernel is not None) == by_kernels
        assert ("m" in adapter.modules) != by_kernels
    elsewhere = bound(base.adapter(1, *classes, path="elsewhere"), way, elsewhere=base)
    host.batch = AdapterBatch(
        tokens=[
            Segment(1, 3, a),
            Segment(3, 4, a, -0.5),
            Segment(3, 4, b, 2.0),
            Segment(4, 6, b),
            Segment(6, 7, elsewhere),
        ],
        outputs=[Segment(0, 8, b)],
    )
    rows: list[Parts] = [
        [], [(first, 1.0)], [(first, 1.0)], [(first, -0.5), (second, 2.0)],
        [(second, 1.0)], [(second, 1.0)], [], [],
    ]  # fmt: skip
    x = torch.randn(8, base.n_in)
    before = x.clone()
    y = layer(x if folded else x[None])
    assert y.shape == ((8, N_OUT) if folded else (1, 8, N_OUT))
    assert torch.equal(x, before)
    untouched = base.module(x)
    for i, parts in enumerate(rows):
        row = y.view(8, N_OUT)[i]
        assert_row(row, base.formula(x[i], parts))
        assert torch.equal(row, untouched[i]) == (not parts)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_torch_and_what_the_kernels_compute_in_one_batch(kind: str) -> None:
    base, host = base_of(kind), AdapterHost()
    layer = AdapterLinear(base.module, "m", host)
    given: list[list[Primitive]] = [
        base.adapter(1, *SIMPLE),
        base.adapter(2),
        base.adapter(3, *SIMPLE, InputRotation),
        base.adapter(4, ModuleOverride),
        base.adapter(5, RowOverride, OutputScale),
        base.adapter(6, LowRank, BiasDelta, rank=17),
        base.adapter(7, LowRank),
    ]
    adapters = [base.bound(primitives, "kernels") for primitives in given]
    assert [a.kernel is not None for a in adapters] == [True, *[False] * 4, True, True]
    spans = [(0, 2, 1), (2, 4, 0), (4, 5, 2), (6, 8, 3), (8, 9, 0), (9, 11, 4), (11, 12, 5)]
    segments = [Segment(start, end, adapters[i]) for start, end, i in spans]
    segments += [Segment(12, 14, adapters[5], 0.5), Segment(12, 14, adapters[6], -1.5)]
    host.batch = AdapterBatch(segments)
    x = torch.randn(1, 15, base.n_in)
    y, untouched = layer(x), base.module(x)
    parts: list[Parts] = [[] for _ in range(15)]
    for start, end, i in spans:
        parts[start:end] = [[(given[i], 1.0)]] * (end - start)
    parts[12:14] = [[(given[5], 0.5), (given[6], -1.5)]] * 2
    for i, of_row in enumerate(parts):
        assert_row(y[0, i], base.formula(x[0, i], of_row))
        assert torch.equal(y[0, i], untouched[0, i]) == (not of_row)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_factors_in_half_precision(way: str, kind: str, dtype: torch.dtype) -> None:
    """Nothing is rounded but the values that the factors have already."""
    base, host = base_of(kind), AdapterHost()
    parts: list[list[Primitive]] = []
    for i, rank in enumerate((1, 6, 19)):
        (p,) = base.adapter(i, LowRank, rank=rank)
        assert isinstance(p, LowRank)
        # So small a number is bfloat16's alone.
        tiny = 1.0 if dtype == torch.float16 else 2.0**-30
        a, b = (p.a * tiny).to(dtype).float(), p.b.to(dtype).float()
        parts.append([LowRank("m", a, b, 0.75 / tiny), *base.adapter(i, OutputScale)])
    adapters = [base.bound(p, way) for p in parts]
    if way == "torch":
        kept = [a.modules["m"].low_rank for a in adapters]
        assert {f.dtype for low_rank in kept if low_rank for f in low_rank[:2]} == {dtype}
    host.batch = AdapterBatch([Segment(2 * i, 2 * i + 1, a) for i, a in enumerate(adapters)])
    x = torch.randn(1, 6, base.n_in)
    y = AdapterLinear(base.module, "m", host)(x)
    for i in range(6):
        given: Parts = [] if i % 2 else [(parts[i // 2], 1.0)]
        assert_row(y[0, i], base.formula(x[0, i], given))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [SIMPLE, PRIMITIVES], ids=["simple", "all"])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(
    way: str, kind: str, classes: list[type[Primitive]]
) -> None:
    """Alone in a batch, or between rows of the base and of another adapter."""
    base, host = base_of(kind), AdapterHost()
    layer = AdapterLinear(base.module, "m", host)
    mine, other = (base.bound(base.adapter(i, *classes), way) for i in (1, 2))
    x = torch.randn(1, 9, base.n_in)
    host.batch = AdapterBatch([Segment(2, 5, mine), Segment(5, 8, other)])
    together = layer(x)
    for i in range(2, 5):
        host.batch = AdapterBatch([Segment(0, 1, mine)])
        alone = layer(x[:, i : i + 1])
        if way == "kernels" and kind in PACKED and classes is SIMPLE:
            assert torch.equal(alone[0, 0], together[0, i])
        torch.testing.assert_close(alone[0, 0], together[0, i], atol=2e-5, rtol=1e-5)


#: (start, end, adapters and weights): the kernels' register tiles, blocks and tasks have borders
#: among these rows.
SPANS = [
    (3, 4, [(0, 1.0)]),
    (4, 40, [(1, 1.0)]),
    (40, 43, [(0, 0.5), (2, -2.0)]),
    (43, 44, [(3, 1.0)]),
    (50, 201, [(2, 1.0)]),
    (201, 230, [(3, 1.0)]),
]


def batch_of(adapters: Sequence[BoundAdapter], start: int, end: int) -> AdapterBatch:
    """The batch whose rows are rows [start, end) of SPANS."""
    return AdapterBatch(
        [
            Segment(max(first, start) - start, min(last, end) - start, adapters[i], weight)
            for first, last, parts in SPANS
            for i, weight in parts
            if max(first, start) < min(last, end)
        ]
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("n_in", [64, 1088])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_the_kernels_give_a_row_the_same_bits_in_every_batch(kind: str, n_in: int) -> None:
    """Alone, in a few rows, in hundreds; whatever the threads, whichever modules beside it."""
    base, beside = Base.make(kind, n_in, 137), Base.make(kind, n_in, 52, seed=1)
    host = AdapterHost()
    layer, second = (
        AdapterLinear(b.module, path, host) for b, path in [(base, "m"), (beside, "second")]
    )
    given = [base.adapter(i, LowRank, BiasDelta, rank=r) for i, r in enumerate((1, 7, 16))]
    given.append(base.adapter(3, *SIMPLE, rank=5))
    for i, dtype in enumerate((torch.float16, torch.bfloat16), 1):
        (low_rank,) = (p for p in given[i] if isinstance(p, LowRank))
        low_rank.a.copy_(low_rank.a.to(dtype))
        low_rank.b.copy_(low_rank.b.to(dtype))
    for i in (1, 3):
        given[i] = [*given[i], *beside.adapter(i, LowRank, rank=9, path="second")]
    adapters = [bound(primitives, "kernels", m=base, second=beside) for primitives in given]
    x = torch.randn(1, 236, n_in)
    host.batch = batch_of(adapters, 0, 236)
    together = layer(x)
    with_second = linears((layer, second), x)
    assert torch.equal(with_second[0], together)
    assert torch.equal(with_second[1], second(x))
    torch.set_num_threads(2)
    assert torch.equal(layer(x), together)
    assert all(map(torch.equal, linears((layer, second), x), with_second))
    rows = [0, 3, 4, 17, 39, 40, 42, 43, 44, 50, 185, 191, 192, 193, 200, 201, 229, 230, 235]
    for start, end in [(i, i + 1) for i in rows] + [(0, 5), (38, 45), (180, 236), (2, 13)]:
        host.batch = batch_of(adapters, start, end)
        assert torch.equal(layer(x[:, start:end]), together[:, start:end]), (start, end)
        both = linears((second, layer), x[:, start:end])
        assert torch.equal(both[0], with_second[1][:, start:end])
        assert torch.equal(both[1], together[:, start:end])
    for i in (0, 3, 4, 41, 43, 100, 210):
        parts = [(given[j], w) for first, last, of in SPANS if first <= i < last for j, w in of]
        own = [([p for p in primitives if p.module == "m"], w) for primitives, w in parts]  # type: ignore[union-attr]
        expected = base.formula(x[0, i], own)
        error = (together[0, i].double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5


@torch.inference_mode()
def test_the_kernels_read_an_adapter_where_it_lies() -> None:
    """Nothing of it is copied: what the arena loses is lost."""
    base, host = base_of("nf4"), AdapterHost()
    packed = pack(AdapterProgram("d", "ANY", base.adapter(1, LowRank, BiasDelta)), torch.float32)
    adapter = bind("d", packed.layout, packed.data, 0, {"m": (N_IN, N_OUT)})
    host.batch = AdapterBatch([Segment(0, 2, adapter)])
    layer, x = AdapterLinear(base.module, "m", host), torch.randn(1, 2, N_IN)
    assert not torch.equal(layer(x), base.module(x))
    packed.data.zero_()
    assert torch.equal(layer(x), base.module(x))


# -- several modules that read one input -------------------------------------------------------

TRIPLES = [
    ("nf4", "nf4", "nf4"), ("int8", "int8", "int8"), ("nf4", "int8", "nf4"),
    ("linear", "no bias", "linear"), ("conv1d", "conv1d", "conv1d"), ("nf4", "linear", "conv1d"),
]  # fmt: skip


class Launches:
    """The kernels, with the modules of every launch of a linear map written down."""

    def __init__(self) -> None:
        self.modules: list[int] = []

    def linear(self, x: Tensor, weights: list[Any], *rest: Any) -> Any:
        self.modules.append(len(weights))
        return kernels().linear(x, weights, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels(), name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kinds", TRIPLES, ids="+".join)
@pytest.mark.parametrize("wrapped", [(True, True, True), (True, False, True), (False,) * 3])
@pytest.mark.parametrize("rotated", [False, True])
@torch.inference_mode()
def test_several_modules_of_one_input(
    way: str,
    kinds: tuple[str, ...],
    wrapped: tuple[bool, ...],
    rotated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each module's own adapters, on some of the modules, and rows of none."""
    host = AdapterHost()
    sizes = (N_OUT, 36, 7)
    bases = {
        path: Base.make(kind, N_IN, size, seed)
        for seed, (path, kind, size) in enumerate(zip("qkv", kinds, sizes, strict=True))
    }
    modules = [
        AdapterLinear(base.module, path, host) if wrap else base.module
        for (path, base), wrap in zip(bases.items(), wrapped, strict=True)
    ]
    everywhere = [p for path, base in bases.items() for p in base.adapter(1, *SIMPLE, path=path)]
    only_k = bases["k"].adapter(2, LowRank, BiasDelta, rank=7, path="k")
    partly = [
        *bases["q"].adapter(3, *SIMPLE, *([InputRotation] if rotated else []), path="q"),
        *bases["v"].adapter(4, LowRank, *([ModuleOverride] if rotated else []), path="v"),
    ]
    a, b, c = (bound(primitives, way, **bases) for primitives in (everywhere, only_k, partly))
    host.batch = AdapterBatch(
        [Segment(0, 2, a), Segment(3, 4, b), Segment(4, 6, c), Segment(6, 7, a), Segment(7, 8, b)]
    )
    owners: list[list[Primitive]] = [
        everywhere, everywhere, [], only_k, partly, partly, everywhere, only_k, [],
    ]  # fmt: skip
    x = torch.randn(1, len(owners), N_IN)
    before = x.clone()
    results = linears(modules, x)
    assert torch.equal(x, before)
    for (path, base), module, is_wrapped, y in zip(
        bases.items(), modules, wrapped, results, strict=True
    ):
        assert y.shape == (1, len(owners), len(base.weight))
        assert torch.equal(y, module(x))
        untouched = base.module(x)
        for i, owner in enumerate(owners):
            own = [p for p in owner if is_wrapped and getattr(p, "module", "") == path]
            assert_row(y[0, i], base.formula(x[0, i], [(own, 1.0)]))
            assert torch.equal(y[0, i], untouched[0, i]) == (not own)

    launches = Launches()
    monkeypatch.setattr(layers, "kernels", lambda: launches)
    host.kernels = launches
    again = linears(modules, x)
    assert all(map(torch.equal, again, results))
    if set(kinds) <= set(PACKED) and way == "kernels" and not (rotated and wrapped[0]):
        assert launches.modules == [3]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_output_embedding_has_segments_of_its_own(way: str, kind: str) -> None:
    """Its rows are those of which logits are computed, not the batch's tokens."""
    base, host = base_of(kind), AdapterHost()
    given = base.adapter(1, *SIMPLE)
    other = bound(base.adapter(1, *SIMPLE, path="elsewhere"), way, elsewhere=base)
    here = base.bound(base.adapter(2, *SIMPLE), way)  # would be seen in row 0
    outputs = [Segment(1, 2, base.bound(given, way))]
    tokens = [Segment(0, 1, here), Segment(5, 9, other)]
    host.batch = AdapterBatch(tokens=tokens, outputs=outputs)
    x = torch.randn(1, 2, base.n_in)
    layer = AdapterLinear(base.module, "m", host, is_output=True)
    for y in (layer(x), linears((layer,), x)[0]):
        assert torch.equal(y[0, 0], base.module(x)[0, 0])
        assert_row(y[0, 1], base.formula(x[0, 1], [(given, 1.0)]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_no_rows(way: str, kind: str) -> None:
    """No sequence of the batch has come to its last token: no logits are wanted."""
    base, host = base_of(kind), AdapterHost()
    adapter = base.bound(base.adapter(1, *SIMPLE), way)
    host.batch = AdapterBatch(outputs=[Segment(0, 0, adapter)])
    layer = AdapterLinear(base.module, "m", host, is_output=True)
    assert layer(torch.empty(1, 0, base.n_in)).shape == (1, 0, N_OUT)
