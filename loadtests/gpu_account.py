"""What a decode step must move, compute and launch on a GPU, by arithmetic: no measurement.

    python -m loadtests.gpu_account                     # Qwen2.5-7B and Llama-2-7B, 64 adapters
    python -m loadtests.gpu_account --rank 64 --context 4096
    python -m loadtests.gpu_account --count             # launches of the code as it is, counted

One token for each of --batch sequences over a base in nf4 (a half byte a weight, and a float32
scale for 64 of them), --adapters LoRA over all linear layers in bfloat16, keys and values in
bfloat16. Bounds are against NVIDIA's figures for an H100 SXM: 3.35 TB/s, and 989 TFLOP/s of dense
bfloat16. docs/gpu.md derives each row.

--count runs the engine on this machine's CPU by torch's operations alone, which are those that a
GPU runs, and counts those that compute or copy, each of which is at least one launch there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loadtests.in_process import InProcess, in_process
from peftcore.ops.cpu.build import CAPABILITY_VARIABLE

#: Bytes of a weight in nf4 with its scale, and of a bfloat16.
NF4, BF16 = 0.5 + 4 / 64, 2


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes, as its config.json has them."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linears(self) -> Sequence[tuple[int, int]]:
        """(out, in) of a layer's q, k, v, o, gate, up and down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (queries, self.hidden), (keys, self.hidden), (keys, self.hidden),
            (self.hidden, queries), (self.inner, self.hidden), (self.inner, self.hidden),
            (self.hidden, self.inner),
        )  # fmt: skip

    @property
    def num_weights(self) -> int:
        """Of all layers' linears."""
        return self.layers * sum(out * in_ for out, in_ in self.linears)

    @property
    def low_rank_width(self) -> int:
        """Values of a LoRA of rank 1 over all linears."""
        return self.layers * sum(out + in_ for out, in_ in self.linears)

    @property
    def position_bytes(self) -> int:
        """Of one position's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * BF16


MODELS = (
    Shapes("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 128, 152064),
    Shapes("Llama-2-7B", 4096, 11008, 32, 32, 32, 128, 32000),
)


@dataclass(frozen=True)
class Card:
    """A GPU's figures, its maker's."""

    name: str
    bytes_per_s: float
    flop_per_s: float


H100 = Card("H100 SXM", 3.35e12, 989e12)


@dataclass(frozen=True)
class Case:
    batch: int = 64
    adapters: int = 64
    rank: int = 16
    context: int = 1024


@dataclass(frozen=True)
class Row:
    """A part of the step. `num_bytes` of device memory, `flop` of multiplications and additions."""

    part: str
    num_bytes: float
    flop: float

    def seconds(self, card: Card) -> float:
        """The least that it takes: the later of its bytes and its arithmetic."""
        return max(self.num_bytes / card.bytes_per_s, self.flop / card.flop_per_s)


def account(model: Shapes, case: Case) -> list[Row]:
    """The parts of a step. Weights, and what a sequence keeps, are read once; activations, of some
    megabytes, stay in the L2 cache."""
    codes, head = model.num_weights * NF4, model.vocab * model.hidden
    low_rank = case.rank * model.low_rank_width
    values = model.layers * model.heads * model.head_dim * case.context
    return [
        Row("base: codes and scales", codes, 2 * case.batch * model.num_weights),
        Row("head", head * BF16, 2 * case.batch * head),
        Row(
            "keys and values",
            case.batch * (case.context + 1) * model.position_bytes,
            4 * case.batch * values,
        ),
        Row("adapters", case.adapters * low_rank * BF16, 2 * case.batch * low_rank),
    ]


def dequantized(model: Shapes) -> Row:
    """What a dequantized copy of each weight adds: written once and read once."""
    return Row("bfloat16 copies of the weights", model.num_weights * 2 * BF16, 0)


def table(model: Shapes, case: Case, card: Card) -> str:
    """The account as Markdown."""
    rows = account(model, case)
    lines = [
        f"{model.name}, nf4, {case.adapters} LoRA of rank {case.rank}, batch {case.batch}, "
        f"context {case.context}; bounds on a {card.name}, not measured:",
        "",
        "| part | GB | GFLOP | by bytes, ms | by arithmetic, ms |",
        "|---|---|---|---|---|",
    ]
    total = Row("step", sum(r.num_bytes for r in rows), sum(r.flop for r in rows))
    for row in (*rows, total, dequantized(model)):
        lines.append(
            f"| {row.part} | {row.num_bytes / 1e9:.2f} | {row.flop / 1e9:,.0f} | "
            f"{1e3 * row.num_bytes / card.bytes_per_s:.2f} | "
            f"{1e3 * row.flop / card.flop_per_s:.2f} |"
        )
    *others, adapters = rows
    base, own = sum(r.seconds(card) for r in others), adapters.seconds(card)
    lines += ["", f"A step of the base: {1e3 * base:.2f} ms at least; adapters: {1e3 * own:.2f} ms "
              f"more, {own / base:.0%} of it."]  # fmt: skip
    return "\n".join(lines)


# -- launches, counted -----------------------------------------------------------------------------


_NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh")


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy: no views, and no memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_NO_LAUNCH):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_step(world: InProcess, case: Case, *, adapters: bool) -> Counter[str]:
    """Of one step in which each of `case.batch` sequences gets its second token."""

    def run() -> None:
        world.run(streams=case.batch, prompt_tokens=8, output_tokens=3, adapters=adapters, seed=0)

    counted: Counter[str] = Counter()
    run()  # its adapters are resident afterwards
    step = world.engine.step

    def counting() -> Any:
        decoding = bool(world.engine.live) and all(s.num_output_tokens for s in world.engine.live)
        with Launches() as mode:
            outputs = step()
        if decoding and len(outputs) == case.batch and not counted:
            counted.update(mode.counts)
        return outputs

    world.engine.step = counting  # type: ignore[method-assign]
    try:
        run()
    finally:
        world.engine.step = step  # type: ignore[method-assign]
    return counted


def count(case: Case, model: str | None) -> dict[str, Any]:
    """Launches of a decode step without adapters and with them, by torch's operations."""
    os.environ[CAPABILITY_VARIABLE] = "none"  # no kernels: a GPU has none of them either
    settings: dict[str, object] = {
        "quantization": "none", "device": "cpu", "max_num_seqs": case.batch,
        "adapter_memory": f"{max(256, 16 * case.adapters)}MiB",
    }  # fmt: skip
    if model:
        settings["model"] = model
    with in_process(settings, num_adapters=case.adapters, rank=case.rank) as world:
        layers = world.engine.runner.loaded.model.config.get_text_config().num_hidden_layers
        found = {
            name: launches_of_a_step(world, case, adapters=adapters)
            for name, adapters in (("base", False), ("adapters", True))
        }
    return {
        "torch": torch.__version__,
        "layers": layers,
        "batch": case.batch,
        "adapters": case.adapters,
        "launches": {name: counts.total() for name, counts in found.items()},
        "most": {name: dict(counts.most_common(8)) for name, counts in found.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, reckon or count, print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu_account",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("batch", 64), ("adapters", 64), ("rank", 16), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--count", action="store_true", help="count launches; JSON")
    parser.add_argument("--model", help="of --count, as polypeft-serve's")
    args = parser.parse_args(argv)
    case = Case(args.batch, args.adapters, args.rank, args.context)
    if min(args.batch, args.adapters, args.rank, args.context) < 1:
        parser.error("all numbers: over 0")
    if args.count:
        print(json.dumps(count(case, args.model), indent=1))
        return
    print("\n\n".join(table(model, case, H100) for model in MODELS))


if __name__ == "__main__":
    main()
