"""The adapters' kernels on a GPU, against torch and against the card: `python -m loadtests.gpu`

The low-rank updates of one layer of a 7B model, all its linear modules, for segments of rows with
adapters of their own: what `peftcore.ops.select` gives for the device against a loop over segments,
batched matmuls over gathered adapters, and torch's grouped_mm. What is read is cold: calls go
round layers that fill 512 MiB together. Medians of nine times, each of twenty calls between two
events of the card.

columns:
    ms          of one layer
    GB/s        bytes of the adapters in use, and of inputs and outputs, each once / time
    of copy     that, over what a large copy reached in the same run
    TFLOP/s     2 · rows · rank · (in + out) / time
    of matmul   that, over what a large bfloat16 matmul reached in the same run
    error       against float64, relative to the largest value

--smoke runs it at tiny sizes on whatever there is, the CPU too, to test the code; its times are no
measurement, and it says so. Serving on a GPU: `python -m loadtests.serving --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loadtests.gpu_account import MODELS, Shapes
from loadtests.gpu_check import facts
from loadtests.kernel_low_rank import Segment, joined
from loadtests.traffic import choose
from peftcore.ops import Kernels, LowRankPart, grouped, select
from peftcore.ops.cpu import kernels
from peftcore.ops.tiles import tiled

OURS, LOOP, GATHERED, GROUPED = "ours", "torch loop", "gathered bmm", "torch grouped_mm"
_SMOKE = Shapes("tiny", 64, 96, 1, 4, 2, 16, 128)
#: Most bytes that gathered adapters may take.
_GATHERED_BYTES = 4 << 30

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`rows` rows in equal streams; stream i has the adapter that the popularity gives it."""

    popularity: str
    rows: int
    streams: int
    adapters: int
    rank: int


@dataclass(frozen=True)
class Sizes:
    """How large and how often: of a measurement or of a smoke test."""

    model: Shapes
    cases: Sequence[Case]
    cold_bytes: int
    copy_bytes: int
    matmul: int
    calls: int
    repeats: int


MEASURED = Sizes(
    MODELS[0],
    (
        Case("distinct", 64, 64, 64, 16),
        Case("zipf", 64, 64, 64, 16),
        Case("identical", 64, 64, 64, 16),
        Case("distinct", 64, 64, 64, 64),
        Case("distinct", 2048, 8, 8, 16),
    ),
    512 << 20, 1 << 30, 8192, 20, 9,
)  # fmt: skip
SMOKE = Sizes(
    _SMOKE, (Case("distinct", 8, 4, 4, 8), Case("identical", 8, 4, 4, 8)), 1, 1 << 16, 64, 1, 3
)


class Timer:
    """Seconds of a call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device, calls: int, repeats: int) -> None:
        self._device, self._calls, self._repeats = device, calls, repeats

    def seconds(self, call: Call) -> float:
        """The median over repeats, after two that do not count."""
        found = [self._once(call) for _ in range(self._repeats + 2)]
        return statistics.median(found[2:])

    def _once(self, call: Call) -> float:
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self._calls):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / self._calls
        start = time.perf_counter()
        for _ in range(self._calls):
            call()
        return (time.perf_counter() - start) / self._calls


def limits(timer: Timer, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """`bytes_per_s` of a large copy, read and written, and `flop_per_s` of a bfloat16 matmul."""
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timer.seconds(lambda: target.copy_(source))
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    multiplied = timer.seconds(lambda: a @ b)
    return {"bytes_per_s": 2 * source.nbytes / copied, "flop_per_s": 2 * n**3 / multiplied}


@dataclass(frozen=True)
class Module:
    """One linear module's update: inputs `[rows, in]`, outputs `[rows, out]`, stacked adapters
    `a` `[adapters, in, rank]` and `b` `[adapters, rank, out]`, all bfloat16."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor


def segments_of(case: Case) -> list[Segment]:
    """In the order of adapters, as the engine packs rows; neighbours of one adapter are one."""
    owners = sorted(
        choose(case.popularity, case.streams, case.adapters, num_streams=case.streams, zipf_s=1.0,
               rng=random.Random(0))
    )  # fmt: skip
    return joined(owners, case.rows // case.streams)


def make_layer(model: Shapes, case: Case, device: torch.device, seed: int) -> list[Module]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, device=device, generator=generator)
        return (made / shape[-2] ** 0.5).to(torch.bfloat16)

    return [
        Module(
            draw(case.rows, in_) * case.rows**0.5,
            torch.zeros(case.rows, out, dtype=torch.bfloat16, device=device),
            draw(case.adapters, in_, case.rank),
            draw(case.adapters, case.rank, out),
        )
        for out, in_ in model.linears
    ]


# -- the contenders: each makes a call that adds one layer's updates to its outputs ----------------


def _parts(module: Module, segments: Sequence[Segment]) -> list[LowRankPart]:
    return [LowRankPart(s, e, module.a[o], module.b[o], 1.0) for s, e, o in segments]


def _ours(ops: Kernels) -> Callable[[Sequence[Module], Sequence[Segment]], Call]:
    """The kernels that serve, a module at a time: no two of a layer have the same inputs here."""

    def prepare(layer: Sequence[Module], segments: Sequence[Segment]) -> Call:
        adapters = {owner: ops.Adapter() for *_, owner in segments}
        for owner, adapter in adapters.items():
            for i, m in enumerate(layer):
                down, up = m.a[owner].t().contiguous(), tiled(m.b[owner].t())
                adapter.set(i, m.x.shape[1], m.y.shape[1], a=down, b=up, scale=1.0)
        batch = ops.Batch([(start, end, adapters[owner], 1.0) for start, end, owner in segments])

        def call() -> None:
            for i, m in enumerate(layer):
                ops.add_adapters_(m.y, m.x, i, batch)

        return call

    return prepare


def _loop(layer: Sequence[Module], segments: Sequence[Segment]) -> Call:
    parts = [_parts(module, segments) for module in layer]

    def call() -> None:
        for module, of_one in zip(layer, parts, strict=True):
            grouped.add_low_rank_(module.y, module.x, of_one)

    return call


def _gathered(layer: Sequence[Module], segments: Sequence[Segment]) -> Call:
    device = layer[0].x.device
    owners = torch.tensor([o for s, e, o in segments for _ in range(e - s)], device=device)
    if len(owners) * max(m.a[0].nbytes + m.b[0].nbytes for m in layer) > _GATHERED_BYTES:
        raise NotImplementedError("a copy of an adapter for every row takes too much memory")

    def call() -> None:
        for m in layer:
            shrunk = torch.bmm(m.x[:, None], m.a[owners])
            m.y.add_(torch.bmm(shrunk, m.b[owners])[:, 0])

    return call


def _grouped_mm(layer: Sequence[Module], segments: Sequence[Segment]) -> Call:
    if not hasattr(F, "grouped_mm"):
        raise NotImplementedError("this torch has no grouped_mm")
    device = layer[0].x.device
    ends = torch.tensor([e for _, e, _ in segments], dtype=torch.int32, device=device)
    used = torch.tensor([o for _, _, o in segments], device=device)
    stacks = [(m.a[used], m.b[used]) for m in layer]  # stacked before: at its best

    def call() -> None:
        for m, (a, b) in zip(layer, stacks, strict=True):
            m.y.add_(F.grouped_mm(F.grouped_mm(m.x, a, offs=ends), b, offs=ends))

    return call


def contenders(device: torch.device) -> dict[str, Callable[..., Call]]:
    """By name. Ours only where Triton's kernels are chosen: a CPU's know no bfloat16 outputs."""
    made = {LOOP: _loop, GATHERED: _gathered, GROUPED: _grouped_mm}
    ours = select(device)
    return made if ours is None or ours is kernels() else {OURS: _ours(ours), **made}


# -- the measurement -------------------------------------------------------------------------------


def error_of(layer: Sequence[Module], segments: Sequence[Segment], call: Call) -> float:
    """Of one call from zero outputs, the largest over modules, relative to the largest value."""
    for module in layer:
        module.y.zero_()
    call()
    worst = 0.0
    for m in layer:
        expected = torch.zeros(m.y.shape, dtype=torch.float64, device=m.y.device)
        for start, end, owner in segments:
            expected[start:end] = (
                m.x[start:end].double() @ m.a[owner].double() @ m.b[owner].double()
            )
        worst = max(worst, float((m.y - expected).abs().max() / expected.abs().max()))
    return worst


def work_of(layer: Sequence[Module], segments: Sequence[Segment]) -> tuple[int, int]:
    """Bytes and operations of one call: adapters in use once, inputs read, outputs read and
    written."""
    used = len({owner for *_, owner in segments})
    num_bytes = sum(
        used * (m.a[0].nbytes + m.b[0].nbytes) + m.x.nbytes + 2 * m.y.nbytes for m in layer
    )
    flop = sum(2 * len(m.x) * (m.a[0].numel() + m.b[0].numel()) for m in layer)
    return num_bytes, flop


def measure_case(
    sizes: Sizes, case: Case, device: torch.device, timer: Timer, best: dict[str, float]
) -> list[dict[str, Any]]:
    """A row a contender."""
    segments = segments_of(case)
    first = make_layer(sizes.model, case, device, 0)
    num_bytes, flop = work_of(first, segments)
    count = max(1, -(-sizes.cold_bytes // num_bytes))
    layers = [first, *(make_layer(sizes.model, case, device, seed) for seed in range(1, count))]
    rows = []
    for name, prepare in contenders(device).items():
        row: dict[str, Any] = {"case": asdict(case), "contender": name}
        rows.append(row)
        try:
            calls = [prepare(layer, segments) for layer in layers]
            row["error"] = error_of(first, segments, calls[0])
        except (NotImplementedError, RuntimeError) as exc:
            row["unavailable"] = str(exc).splitlines()[0]
            continue
        turn = iter(range(1 << 62))

        def call(calls: Sequence[Call] = calls, turn: Any = turn) -> None:
            calls[next(turn) % len(calls)]()

        seconds = timer.seconds(call)
        row |= {
            "seconds": seconds,
            "bytes_per_s": num_bytes / seconds,
            "of_copy": num_bytes / seconds / best["bytes_per_s"],
            "flop_per_s": flop / seconds,
            "of_matmul": flop / seconds / best["flop_per_s"],
        }
    return rows


def show(result: dict[str, Any]) -> None:
    best = result["limits"]
    print(f"copy {best['bytes_per_s'] / 1e9:,.1f} GB/s, bfloat16 matmul "
          f"{best['flop_per_s'] / 1e12:,.2f} TFLOP/s")  # fmt: skip
    head = ("case", "contender", "ms", "GB/s", "of copy", "TFLOP/s", "of matmul", "error")
    print("{:<28} {:<17} {:>9} {:>8} {:>8} {:>8} {:>9} {:>8}".format(*head))
    for row in result["rows"]:
        label = label_of(row["case"])
        if "unavailable" in row:
            print(f"{label:<28} {row['contender']:<17} {row['unavailable']}")
            continue
        print(
            f"{label:<28} {row['contender']:<17} {1e3 * row['seconds']:>9.3f} "
            f"{row['bytes_per_s'] / 1e9:>8.1f} {row['of_copy']:>8.1%} "
            f"{row['flop_per_s'] / 1e12:>8.3f} {row['of_matmul']:>9.2%} {row['error']:>8.1e}"
        )


def label_of(case: dict[str, Any]) -> str:
    return f"{case['popularity']}, {case['rows']} rows, rank {case['rank']}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: which share of the copy's bandwidth each contender reached, by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label_of(row["case"]) for row in result["rows"]))
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(labels) * len(names)))
    for i, name in enumerate(names):
        rows = [r for r in result["rows"] if r["contender"] == name and "of_copy" in r]
        places = [labels.index(label_of(r["case"])) + i * 0.8 / len(names) for r in rows]
        axes.barh(places, [100 * r["of_copy"] for r in rows], 0.8 / len(names), label=name)
    axes.set_yticks([i + 0.3 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("% of the bandwidth of a large copy")
    card = result["facts"].get("card") or "CPU"
    title = f"low-rank updates of one layer of {result['model']}, {card}"
    axes.set_title(f"{title}: no measurement" if result["smoke"] else title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(sizes: Sizes, device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Limits, then every case; JSON."""
    timer = Timer(device, sizes.calls, sizes.repeats)
    with torch.inference_mode():
        best = limits(timer, sizes, device)
        rows = [
            row for case in sizes.cases for row in measure_case(sizes, case, device, timer, best)
        ]
    return {
        "smoke": smoke,
        "device": str(device),
        "facts": facts(),
        "model": sizes.model.name,
        "limits": best,
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print. Exit status 2 without a GPU, but for --smoke."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them here")
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.smoke:
        print("loadtests.gpu: there is no GPU; nothing was measured (--smoke tests the code)",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    device = torch.device("cuda" if has_gpu else "cpu")
    result = run(SMOKE if args.smoke else MEASURED, device, smoke=args.smoke)
    if args.smoke:
        print("a smoke test at tiny sizes: its times are no measurement")
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
