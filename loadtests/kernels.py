"""How fast are the CPU kernels, and against whom? `python -m loadtests.kernels`

Each kernel beside other ways to the same result, in one process and in turns; medians over
--repeats. What is read is cold: every contender has copies of its weights, adapters or caches that
fill 64 MB together, and calls go round them, as a model's layers follow one another.

    matmul      x Wᵀ over int8 and nf4 weights, for shapes of SmolLM2-135M and of a model of 10⁹
                weights, against torch's and oneDNN's float32 and bf16, torch's packed int8 and
                int4, fbgemm's dynamic int8 and bitsandbytes' own; then all linear layers of
                SmolLM2-135M at one row
    low-rank    the adapters' share: sixteen LoRA over all linear layers of one layer of
                SmolLM2-135M, by how requests are spread over them, against a loop over segments in
                torch and gathered batched matmuls
    attention   one layer over a paged cache, against torch's gather and
                scaled_dot_product_attention

columns:
    ms, x       of one call, the median; how many times faster than the baseline, above 1 is faster
    GFLOP/s     2 · rows · out · in / time, whatever a contender multiplies in
    GB/s        bytes of weights (adapters, keys and values) in their own form / time
    limit       the least time that the machine's measured limits allow / the time taken; of float32
                arithmetic, which dot products of bytes can pass
    error       of the result, against float64 over the weights before any quantization

A third busy process on two cores stalls every parallel region until it is put aside, 8 ms here,
for all contenders alike. Rounds in which other processes used the cores are therefore measured
anew, once it is quiet again; what --patience does not suffice for is counted at the end.

examples:
    python -m loadtests.kernels --json kernels.json
    # one row and sixteen, one shape
    python -m loadtests.kernels --only matmul --shapes 1536x576 --rows 1,16
    # decoding only
    python -m loadtests.kernels --only low-rank,attention --rows 16 --repeats 15
    # on one thread
    python -m loadtests.kernels --threads 1
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loadtests import kernel_attention, kernel_low_rank, kernel_matmul
from loadtests.machine import Limits, Watch, measure_limits, num_threads
from loadtests.training import machine
from peftcore.ops.cpu import kernels_status

SECTIONS = ("matmul", "low-rank", "attention")


def sections(text: str) -> list[str]:
    """Names, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SECTIONS)}")
    return names


def shapes(text: str) -> list[tuple[int, int]]:
    """OUTxIN, separated by commas. nf4's scales and torch's int4 want inputs in groups of 64."""
    found = []
    for item in text.split(","):
        sizes = item.split("x")
        if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
            raise argparse.ArgumentTypeError(f"{item!r} is not OUTxIN, as 1536x576 is")
        out, in_ = map(int, sizes)
        if in_ % 64:
            raise argparse.ArgumentTypeError(f"{item!r}: the inputs are not a multiple of 64")
        found.append((out, in_))
    return found


def counts(text: str) -> list[int]:
    """Numbers over 0, separated by commas."""
    items = text.split(",")
    for item in items:
        if not (item.isdecimal() and int(item) > 0):
            raise argparse.ArgumentTypeError(f"{item!r} is not a number over 0")
    return [int(item) for item in items]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=sections, default=SECTIONS, metavar="NAMES",
                        help=f"of {', '.join(SECTIONS)}; separated by commas")  # fmt: skip
    parser.add_argument("--shapes", type=shapes, metavar="OUTxIN,...",
                        help="of matmul's weights; without the whole model's")  # fmt: skip
    parser.add_argument("--rows", type=counts, metavar="N,...",
                        help="of matmul: 1,4,16,64,256,1024 (a head's up to 64); of low-rank, "
                        "where they are multiples of 16: 16,256")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--max-seconds", type=float, default=0.2, metavar="S",
                        help="of one contender in one case; slow ones are repeated less often, but "
                        "at least three times (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--patience", type=float, default=60.0, metavar="S",
                        help="seconds to wait in all for a quiet machine "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads, args.max_seconds) <= 0 or args.patience < 0:
        parser.error("--repeats, --threads and --max-seconds: over 0; --patience: at least 0")
    if "low-rank" in args.only and not low_rank_rows(args):
        parser.error("--rows: low-rank takes multiples of 16")
    return args


def low_rank_rows(args: argparse.Namespace) -> list[int]:
    streams = kernel_low_rank.NUM_STREAMS
    return [n for n in args.rows or kernel_low_rank.ROWS if n % streams == 0]


def num_steps(args: argparse.Namespace) -> int:
    """Of the progress bar: races."""
    count = 0
    if "matmul" in args.only:
        chosen, rows = matmul_cases(args)
        count += sum(len(kernel_matmul.rows_of(shape, rows)) for shape in chosen)
        count += not args.shapes
    if "low-rank" in args.only:
        count += kernel_low_rank.num_cases(low_rank_rows(args))
    if "attention" in args.only:
        count += len(kernel_attention.CASES) * len(kernel_attention.DTYPES)
    return count


def matmul_cases(args: argparse.Namespace) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    return args.shapes or kernel_matmul.SHAPES, args.rows or kernel_matmul.ROWS


def measure(args: argparse.Namespace, watch: Watch) -> list[dict[str, Any]]:
    """The records of all sections."""
    how: dict[str, Any] = {"repeats": args.repeats, "max_seconds": args.max_seconds, "watch": watch}
    records: list[dict[str, Any]] = []
    with tqdm(total=num_steps(args), unit="case", file=sys.stderr) as bar:

        def step(section: str) -> None:
            bar.set_description(section)
            bar.update()

        if "matmul" in args.only:
            chosen, rows = matmul_cases(args)
            matmul = partial(step, "matmul")
            records += kernel_matmul.run(shapes=chosen, rows=rows, step=matmul, **how)
            if not args.shapes:
                records += kernel_matmul.run_model(repeats=args.repeats, step=matmul, watch=watch)
        if "low-rank" in args.only:
            records += kernel_low_rank.run(
                rows=low_rank_rows(args), step=partial(step, "low-rank"), **how
            )
        if "attention" in args.only:
            records += kernel_attention.run(step=partial(step, "attention"), **how)
    return records


def put_limits(records: Sequence[dict[str, Any]], limits: Limits) -> None:
    """Into the records, in place: limit_share, the machine's least time / the time taken."""
    for r in records:
        if "flop" in r:
            r["limit_share"] = limits.seconds(r["flop"], r["bytes"]) / (r["ms"] / 1e3)


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables, one text each."""
    tables = {
        "matmul": kernel_matmul.show,
        "model": kernel_matmul.show_model,
        "low-rank": kernel_low_rank.show,
        "attention": kernel_attention.show,
    }
    for section, of in tables.items():
        found = [r for r in records if r["section"] == section]
        if found:
            yield from of(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    args = parse(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    watch, start = Watch(args.patience), time.perf_counter()
    before = measure_limits(args.threads, watch)
    with num_threads(args.threads), torch.inference_mode():
        records = measure(args, watch)
    # Memory is shared with machines that nobody sees from here: it has its better moments.
    limits = before.best_of(measure_limits(args.threads, watch))
    put_limits(records, limits)
    about = {
        **machine(args),
        "kernels": kernels_status(),
        "gflops_limit": limits.gflops,
        "read_gb_limit": limits.read_gb,
    }
    print(
        f"{about['processor']}, {limits.threads} threads, kernels: {about['kernels']}, torch "
        f"{about['torch']}\nmeasured limits: {limits.gflops:.0f} GFLOP/s in float32, "
        f"{limits.read_gb:.1f} GB/s read"
    )
    for text in show(records):
        print(f"\n{text}")
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s", end="")
    if watch.num_disturbed:
        print(f"; other processes disturbed {watch.num_disturbed} rounds of these figures", end="")
    print()
    if args.json:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        result = {
            "machine": about, "arguments": given, "seconds": seconds,
            "disturbed_rounds": watch.num_disturbed, "results": records,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
