"""How soon does it serve, and in how much memory? `python -m loadtests.startup`

Starts polypeft-serve several times, until it answers /health over HTTP. Then adapters are uploaded
to the last one, and each is asked once, --streams at a time. Sizes are of the server's process, in
MB of 10⁶ bytes, as Linux counts them:

    resident    what of its memory is in RAM at that time (VmRSS)
    peak        the most that ever was, from the start on (VmHWM)

The model is converted and the kernels are compiled before anything is timed.

examples:
    python -m loadtests.startup --quantization nf4 --json result.json
    python -m loadtests.startup --starts 1 --adapters 64 --server-flag=--adapter-memory=2GiB
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from clients.errors import ClientError
from loadtests.adapters import RandomAdapters
from loadtests.local_server import LocalServer, local_server
from loadtests.phase import health, run_phase
from loadtests.serving import adapter_names, number, prompt_token_ids, register
from loadtests.traffic import Case, Prompts, closed_loop, requests_of
from loadtests.training import machine
from peftcore.ops.cpu import kernels
from peftcore.sources.resolve import ModelSourceError, resolve_model

_FIELD = re.compile(r"^(VmRSS|VmHWM):\s+(\d+) kB$", re.MULTILINE)


def memory(pid: int) -> dict[str, float]:
    """`resident_mb` and `peak_mb` of a process; nothing where there is no /proc of Linux's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    names = {"VmRSS": "resident_mb", "VmHWM": "peak_mb"}
    return {names[field]: int(kib) * 1024 / 1e6 for field, kib in _FIELD.findall(status)}


def use_adapters(
    server: LocalServer, model_folder: Path, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Upload the adapters and ask each one once; the server's memory after either.

    Raises SystemExit where a request fails.
    """
    names = adapter_names(args.adapters)
    register(server.url, RandomAdapters(model_folder, ["lora"], rank=args.rank), names)
    uploaded = memory(server.pid)
    rng = random.Random(0)
    requests = requests_of(
        Case("distinct", names, "distinct"),
        closed_loop(len(names), args.prompt_tokens, args.output_tokens),
        Prompts(prompt_token_ids(model_folder), rng),
        num_streams=len(names),
        zipf_s=1.0,
        rng=rng,
    )
    phase = asyncio.run(
        run_phase(server.url, requests, args.streams, args.timeout, on_end=lambda: None)
    )
    if bad := [outcome for outcome in phase.outcomes if outcome.status != "ok"]:
        raise SystemExit(f"{bad[0].model}: {bad[0].status} {bad[0].message}")
    return {"uploaded": uploaded, "used": memory(server.pid)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for."""
    folder = resolve_model(args.model).path
    kernels()
    flags = list(args.server_flag)
    for name in ("model", "quantization"):
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name}", value]
    seconds: list[float] = []
    found: dict[str, dict[str, float]] = {}
    for i in range(args.starts):
        with (
            tempfile.TemporaryDirectory() as scratch,
            local_server(["--data-dir", scratch, *flags]) as server,
        ):
            seconds.append(server.seconds)
            if i == args.starts - 1:
                facts = health(server.url)
                found["ready"] = memory(server.pid)
                found |= use_adapters(server, folder, args)
    return {
        "machine": machine(argparse.Namespace(threads=os.cpu_count())),
        "server": facts,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "seconds_to_ready": statistics.median(seconds),
        "starts": seconds,
        "memory": found,
    }


def show(result: dict[str, Any]) -> None:
    """Print the seconds of the starts, then a table of the memory."""
    print(", ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    server = result["server"]
    print(", ".join(f"{k}: {server[k]}" for k in ("model", "quantization", "dtype") if k in server))
    starts = ", ".join(f"{seconds:.2f}" for seconds in result["starts"])
    print(f"ready after {result['seconds_to_ready']:.2f} s, the median of {starts}")
    row = "{:<10} {:>12} {:>8}".format
    print(row("", "resident, MB", "peak, MB"))
    for name, figures in result["memory"].items():
        cells = (figures.get(key) for key in ("resident_mb", "peak_mb"))
        print(row(name, *("-" if cell is None else f"{cell:.0f}" for cell in cells)))


def parser() -> argparse.ArgumentParser:
    count = number(int)
    made = argparse.ArgumentParser(
        prog="python -m loadtests.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", help="as polypeft-serve's; of its tokens prompts are made")
    made.add_argument("--quantization", help="as polypeft-serve's")
    made.add_argument(
        "--server-flag", action="append", default=[], metavar="FLAG",
        help="any other flag of polypeft-serve, as --server-flag=--max-num-seqs=64; repeatable",
    )  # fmt: skip
    made.add_argument("--starts", type=count, default=5, help="medians over them; default 5")
    made.add_argument("--adapters", type=count, default=16, help="default 16")
    made.add_argument("--rank", type=count, default=16,
                      help="of the adapters, LoRA on all linear layers; default 16")  # fmt: skip
    made.add_argument("--streams", type=count, default=16, help="default 16")
    made.add_argument("--prompt-tokens", type=count, default=150, help="default 150")
    made.add_argument("--output-tokens", type=count, default=64, help="default 64")
    made.add_argument("--timeout", type=number(float), default=600.0,
                      help="of one request, in seconds; default 600")  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    args = parser().parse_args(argv)
    if args.json:  # a folder that is not there is better known before than after
        args.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run(args)
    except (ClientError, ModelSourceError, httpx.HTTPError) as exc:
        raise SystemExit(f"loadtests.startup: {exc}") from exc
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
