"""The segmented low-rank op against torch: a loop over segments, and gathered batched matmuls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from loadtests.contest import (
    Contender,
    Unavailable,
    figures,
    num_copies,
    number,
    percent,
    race,
    relative_error,
    table,
)
from loadtests.kernel_matmul import LAUNCHES
from loadtests.machine import Watch
from loadtests.traffic import POPULARITIES, choose
from peftcore.ops import LowRankPart, grouped, reference
from peftcore.ops.cpu import kernels
from peftcore.ops.tiles import tiled
from peftcore.packing import FEWEST_ROUNDED, round_factors
from peftcore.quant import QuantLinear, fast_activations
from peftcore.quant.linear import activation_bits

#: (out, in) of a layer's linear modules.
MODULES = tuple(shape for launch in LAUNCHES for shape in launch)
NUM_ADAPTERS = 16
NUM_STREAMS = 16
ROWS = (16, 256)
RANKS = {
    "16": (16,) * NUM_ADAPTERS,
    "4-64": (16, 64, 8, 32, 4, 16, 24, 48, 8, 64, 16, 32, 12, 16, 32, 64),
}
#: int8: rounded, as a server keeps them beside a quantized base; low ranks are in half precision.
DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_ZIPF_S = 1.0

OURS, LOOP, GATHERED = "ours", "torch loop", "gathered bmm"
#: Ours beside the base's matmul, as the engine runs it: the difference of two contenders.
IN_LAUNCH = "ours, in the base's launch"
_BASE, _BOTH = "int8 base", "int8 base with adapters"

Segment = tuple[int, int, int]  # rows [first, end) are the adapter's


def segments_of(popularity: str, num_rows: int, rng: random.Random) -> list[Segment]:
    """Sixteen streams of as many rows each, in order; neighbours of one adapter are one segment."""
    owners = choose(
        popularity, NUM_STREAMS, NUM_ADAPTERS, num_streams=NUM_STREAMS, zipf_s=_ZIPF_S, rng=rng
    )
    return joined(owners, num_rows // NUM_STREAMS)


def joined(owners: Sequence[int], each: int) -> list[Segment]:
    """Segments of `each` rows an owner, in their order; neighbours of one owner are one."""
    found: list[Segment] = []
    for i, owner in enumerate(owners):
        if found and found[-1][2] == owner:
            found[-1] = (found[-1][0], (i + 1) * each, owner)
        else:
            found.append((i * each, (i + 1) * each, owner))
    return found


#: One layer's factors: module → adapter → A `[rank, in]`, B `[out, rank]`.
Factors = list[dict[int, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Task:
    """Rows of a layer's inputs and of its base's results, and whose they are.

    Attributes:
        dtype: in which ours has the factors.
        factors: of the adapters that have rows; in half precision where dtype is int8.
        x, y: by module.
    """

    dtype: torch.dtype
    ranks: Sequence[int]
    segments: Sequence[Segment]
    factors: Factors
    x: list[Tensor]
    y: list[Tensor]

    @classmethod
    def make(
        cls, ranks: Sequence[int], dtype: torch.dtype, num_rows: int, segments: Sequence[Segment]
    ) -> Task:
        g = torch.Generator().manual_seed(0)
        given = torch.float16 if dtype == torch.int8 else dtype

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        factors: Factors = [
            {
                i: (noise(ranks[i], in_).to(given), (noise(out, ranks[i]) / ranks[i]).to(given))
                for i in sorted({owner for _, _, owner in segments})
            }
            for out, in_ in MODULES
        ]
        x = [noise(num_rows, in_) for _, in_ in MODULES]
        y = [noise(num_rows, out) for out, _ in MODULES]
        return cls(dtype, ranks, segments, factors, x, y)

    @cached_property
    def stored(self) -> list[dict[int, dict[str, Tensor]]]:
        """The factors as the kernels take them."""
        return [{i: self._stored(*pair) for i, pair in m.items()} for m in self.factors]

    def _stored(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        if self.dtype == torch.int8 and len(a) >= FEWEST_ROUNDED:
            return dict(zip(("a", "b", "scales"), round_factors(a, b), strict=True))
        return {"a": a, "b": tiled(b)}

    @property
    def num_bytes(self) -> int:
        """Of the factors that a call reads."""
        return sum(t.nbytes for m in self.stored for of in m.values() for t in of.values())

    @property
    def num_layers(self) -> int:
        """As many copies as are cold."""
        return num_copies(self.num_bytes)

    @property
    def flop(self) -> float:
        sizes = sum(out + in_ for out, in_ in MODULES)
        return 2.0 * sizes * sum((end - start) * self.ranks[i] for start, end, i in self.segments)

    def parts(self, module: dict[int, tuple[Tensor, Tensor]]) -> list[LowRankPart]:
        return [
            LowRankPart(start, end, module[i][0].T, module[i][1].T, _SCALE)
            for start, end, i in self.segments
        ]

    def exact(self) -> list[Tensor]:
        results = [y.double() for y in self.y]
        for x, y, module in zip(self.x, results, self.factors, strict=True):
            reference.add_low_rank_(y, x, self.parts(module))
        return results

    def fresh(self) -> list[Tensor]:
        return [y.clone() for y in self.y]


_SCALE = 0.5


def clone(factors: Factors) -> Factors:
    return [{i: (a.clone(), b.clone()) for i, (a, b) in module.items()} for module in factors]


def run(
    *,
    rows: Sequence[int],
    repeats: int,
    max_seconds: float,
    step: Callable[[], object],
    watch: Watch,
) -> list[dict[str, Any]]:
    """A record for each dtype, set of ranks, number of rows, popularity and contender."""
    records = []
    cases = [
        (dtype, ranks, num_rows, popularity)
        for dtype in DTYPES
        for ranks in RANKS
        for num_rows in rows
        for popularity in POPULARITIES
    ]
    for dtype, ranks, num_rows, popularity in cases:
        segments = segments_of(popularity, num_rows, random.Random(0))
        task = Task.make(RANKS[ranks], DTYPES[dtype], num_rows, segments)
        contenders = contenders_of(task)
        timings = race(contenders, repeats=repeats, max_seconds=max_seconds, watch=watch)
        case = {
            "section": "low-rank", "dtype": dtype, "ranks": ranks, "rows": num_rows,
            "popularity": popularity, "segments": len(segments),
        }  # fmt: skip
        for c in contenders:
            record: dict[str, Any] = {**case, "contender": c.name, "note": c.note}
            if c.name in timings:
                record |= figures(timings[c.name], task.flop, c.num_bytes)
                record["error"] = c.error
            records.append(record)
        if _BOTH in timings and _BASE in timings:
            difference = timings[_BOTH].seconds - timings[_BASE].seconds
            records.append({**case, "contender": IN_LAUNCH, "note": "", "ms": difference * 1e3})
        step()
    return records


def num_cases(rows: Sequence[int]) -> int:
    """Calls of `run`'s step."""
    return len(DTYPES) * len(RANKS) * len(rows) * len(POPULARITIES)


# -- contenders ------------------------------------------------------------------------------------


def contenders_of(task: Task) -> list[Contender]:
    builders: dict[str, Callable[[], Contender]] = {
        OURS: partial(_ours, task),
        LOOP: partial(_loop, task),
        GATHERED: partial(_gathered, task),
        _BASE: partial(_with_base, task, False),
        _BOTH: partial(_with_base, task, True),
    }
    return [Contender.make(name, build) for name, build in builders.items()]


Layer = Callable[[list[Tensor]], Any]  # adds to the modules' results, in place


def _contender(name: str, task: Task, layers: Sequence[Layer], num_bytes: int) -> Contender:
    """Checked once; its calls then add to results of their own again and again."""
    result = task.fresh()
    layers[0](result)
    pairs = zip(result, task.exact(), task.y, strict=True)
    error = max(relative_error(y - before, exact - before) for y, exact, before in pairs)
    y = task.fresh()
    return Contender(name, [partial(layer, y) for layer in layers], num_bytes, error)


def _batch(task: Task) -> Any:
    """Over copies of the factors."""
    ops = kernels()
    adapters = {i: ops.Adapter() for i in task.stored[0]}
    for id_, ((out, in_), module) in enumerate(zip(MODULES, task.stored, strict=True)):
        for i, tensors in module.items():
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            adapters[i].set(id_, in_, out, scale=_SCALE, **copies)
    return ops.Batch([(start, end, adapters[i], 1.0) for start, end, i in task.segments])


def _batches(task: Task) -> list[Any]:
    if kernels() is None:
        raise Unavailable("no kernels")
    return [_batch(task) for _ in range(task.num_layers)]


def _no_codes(task: Task) -> None:
    if task.dtype == torch.int8:
        raise Unavailable("torch multiplies no codes by floats; see float16")


def _ours(task: Task) -> Contender:
    ops = kernels()

    def layer(batch: Any, y: list[Tensor]) -> None:
        for id_, x in enumerate(task.x):
            ops.add_adapters_(y[id_], x, id_, batch)

    layers = [partial(layer, batch) for batch in _batches(task)]
    return _contender(OURS, task, layers, task.num_bytes)


def _loop(task: Task) -> Contender:
    _no_codes(task)

    def layer(parts: list[list[LowRankPart]], y: list[Tensor]) -> None:
        for result, x, of in zip(y, task.x, parts, strict=True):
            grouped.add_low_rank_(result, x, of)

    layers = [
        partial(layer, [task.parts(module) for module in clone(task.factors)])
        for _ in range(task.num_layers)
    ]
    return _contender(LOOP, task, layers, task.num_bytes)


def _gathered(task: Task) -> Contender:
    """Factors padded to the highest rank there is and gathered for every row, in their dtype."""
    _no_codes(task)
    used = list(task.factors[0])
    rank = max(task.ranks[i] for i in used)
    row_of = torch.cat(
        [torch.full((end - start,), used.index(i)) for start, end, i in task.segments]
    )

    def padded(module: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        def pad(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, 0, 0, rank - len(t)))

        a = torch.stack([pad(a) for a, _ in module.values()])
        b = torch.stack([pad(b.T) for _, b in module.values()])
        return a, b

    def layer(factors: list[tuple[Tensor, Tensor]], y: list[Tensor]) -> None:
        for result, x, (a, b) in zip(y, task.x, factors, strict=True):
            shrunk = torch.bmm(a[row_of].float(), x.unsqueeze(2)).transpose(1, 2)
            result.add_(torch.bmm(shrunk, b[row_of].float()).squeeze(1), alpha=_SCALE)

    first = [padded(module) for module in task.factors]
    layers = [
        partial(layer, [(a.clone(), b.clone()) for a, b in first]) for _ in range(task.num_layers)
    ]
    return _contender(GATHERED, task, layers, task.num_bytes)


def _with_base(task: Task, with_adapters: bool) -> Contender:
    """The whole layer's linears over int8 weights, in the engine's launches."""
    ops, bits = kernels(), activation_bits(fast_activations())
    batches: Sequence[Any] = _batches(task)
    if not with_adapters:
        batches = [None] * len(batches)
    codes = [QuantLinear(torch.randn(shape), None, "int8") for shape in MODULES]
    num_bytes = task.num_bytes * with_adapters
    num_bytes += sum(c.codes.nbytes + c.absmax.nbytes for c in codes)

    def layer(weights: list[Any], batch: Any) -> None:
        id_ = 0
        for launch in LAUNCHES:
            stop = id_ + len(launch)
            ops.linear(task.x[id_], weights[id_:stop], [*range(id_, stop)], batch)
            id_ = stop

    # The base alone fills the caches with fewer copies than one adapter's factors do.
    num_bases = num_copies(num_bytes)
    weights = [
        [
            ops.Weight(c.codes.clone(), c.absmax.clone(), None, *shape, activation_bits=bits)
            for c, shape in zip(codes, MODULES, strict=True)
        ]
        for _ in range(min(num_bases, len(batches)))
    ]
    calls = [partial(layer, weights[i % len(weights)], batch) for i, batch in enumerate(batches)]
    return Contender(_BOTH if with_adapters else _BASE, calls, num_bytes)


# -- tables ----------------------------------------------------------------------------------------


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for each number of rows: milliseconds of a layer by dtype, ranks and popularity."""
    shown = (OURS, IN_LAUNCH, LOOP, GATHERED)
    for num_rows in dict.fromkeys(r["rows"] for r in records):
        lines = []
        of = [r for r in records if r["rows"] == num_rows]
        for key in dict.fromkeys((r["dtype"], r["ranks"], r["popularity"]) for r in of):
            found = {
                r["contender"]: r for r in of if (r["dtype"], r["ranks"], r["popularity"]) == key
            }
            ours = found[OURS]
            times = [found.get(name, {}).get("ms") for name in shown]
            cells = [f"{key[0]}, rank {key[1]}, {key[2]}", str(ours["segments"])]
            cells += [number(t) for t in times]
            cells += [_ratio(ours, found[name]) for name in (LOOP, GATHERED)]
            cells += [number(ours.get("read_gb")), percent(ours.get("limit_share"))]
            lines.append(cells)
        titles = [
            f"a layer, {num_rows} rows: ms", "segments", *shown, "loop", "bmm", "GB/s", "limit",
        ]  # fmt: skip
        yield table(titles, lines)


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return f"{theirs['ms'] / ours['ms']:.1f}x" if "ms" in ours and "ms" in theirs else "-"
