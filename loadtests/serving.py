"""How fast does it serve many adapters? `python -m loadtests.serving`

Starts polypeft-serve on a free port (or takes any OpenAI-style server by --url), makes random
adapters, and asks for streamed completions of exact lengths. Cases are compared within one run:

    base        no adapter
    distinct    stream i always asks for adapter i
    identical   all requests ask for one adapter
    uniform     each adapter is as likely as any other
    zipf        the adapter in place k has a probability in proportion to k ** -s (--zipf-s)
    skewed      half of the requests ask for one adapter, the others for any of the rest
    mixed       as distinct, with adapters of five methods: lora, dora, ia3, prefix, prompt

Every case is warmed up once; then each round runs every case, every other round backwards, and the
medians over the rounds count. No two prompts begin with the same token, so no prefix cache helps.

    output tok/s    all tokens that were generated / the wall time of the phase
    ratio           to the output tok/s of the first case in the same round: the median over rounds,
                    and below the table the quartiles
    TTFT            from when the request was due to its first event with text
    ITL             between two events with text of one request; an event can hold several tokens
    E2E             from when the request was due to the end of its stream
    fairness        Jain's index (Jain, Chiu and Hawe 1984, DEC-TR-301), (Σx)² / (n Σx²), over each
                    adapter's x, the output tokens / E2E seconds of all its requests: 1 is fair

examples:
    # 16 streams with an adapter each against 16 without, and against HF peft's mixed batch
    python -m loadtests.serving --compare base,distinct --against peft --json result.json
    # five methods in one batch; a base in 4 bits
    python -m loadtests.serving --compare base,distinct,mixed --quantization nf4
    # a thousand registered adapters of which few fit into memory
    python -m loadtests.serving --compare distinct,zipf --registered 1000 --rank 8 \\
        --adapter-memory 1536MiB
    # an open loop: independent requests, 0.5 a second; or as a recorded trace has them, 4x as fast
    python -m loadtests.serving --rate 0.5 --requests 60
    python -m loadtests.serving --trace AzureLLMInferenceTrace_conv.csv --trace-speed 4
    # another server that has two adapters by these names
    python -m loadtests.serving --url http://127.0.0.1:9000 --models sql,poet --compare base,uniform
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm
from transformers import AutoTokenizer

from clients.client import Client
from clients.errors import ClientError
from loadtests.adapters import METHODS, NUM_VIRTUAL_TOKENS, RandomAdapters
from loadtests.figures import ratios, summarize
from loadtests.local_server import local_server
from loadtests.peft_baseline import Batch, generate_batches
from loadtests.phase import Phase, health, run_phase
from loadtests.traffic import (
    POPULARITIES,
    Case,
    Prompts,
    Request,
    Slot,
    closed_loop,
    poisson,
    read_trace,
    requests_of,
)
from loadtests.training import machine
from peftcore.sources.resolve import ModelSourceError, resolve_model

CASES = ("base", *POPULARITIES, "mixed")

#: Output tokens of the requests that warm a case up; one a stream.
_WARM_UP_TOKENS = 8

#: What peft's process may take to load, in seconds.
_PEFT_LOAD_SECONDS = 600.0

#: The requests of every case, by its name: first of the warm-up, then of each round.
Plan = list[dict[str, list[Request]]]


# -- what is asked ---------------------------------------------------------------------------------


def make_cases(args: argparse.Namespace, base: str) -> list[Case]:
    """The cases to compare, where requests call the base `base`."""
    registered = args.models or adapter_names(args.registered)
    mixed = [f"mixed-{i}" for i in range(args.adapters)]
    every = {"base": Case("base", [base], "identical"), "mixed": Case("mixed", mixed, "distinct")}
    for name in POPULARITIES:
        models = registered[: args.adapters] if name == "distinct" else registered
        every[name] = Case(name, models, name)
    return [every[name] for name in args.compare]


def adapter_names(num_adapters: int) -> list[str]:
    return [f"adapter-{i}" for i in range(num_adapters)]


def make_plan(
    args: argparse.Namespace, cases: Sequence[Case], token_ids: Sequence[int], max_len: int | None
) -> Plan:
    """The same requests whoever answers them.

    Args:
        token_ids: that prompts are made of. max_len: of a trace's requests, in tokens.
    """
    rng = random.Random(args.seed)
    prompts = Prompts(token_ids, rng)
    lengths = args.prompt_tokens, args.output_tokens

    def slots() -> list[Slot]:
        if args.trace:
            return read_trace(args.trace, args.requests, args.trace_speed, max_len)
        if args.rate:
            return poisson(args.requests, args.rate, *lengths, rng)
        return closed_loop(args.requests, *lengths)

    warm_up = closed_loop(args.streams, lengths[0], min(_WARM_UP_TOKENS, lengths[1]))
    return [
        {
            case.name: requests_of(
                case, of_round, prompts, num_streams=args.streams, zipf_s=args.zipf_s, rng=rng
            )
            for case in cases
        }
        for of_round in [warm_up, *(slots() for _ in range(args.rounds))]
    ]


def prompt_token_ids(model_folder: Path) -> list[int]:
    """The model's tokens, without those that were added to its vocabulary: special ones."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))


# -- who answers -----------------------------------------------------------------------------------


@contextmanager
def target(args: argparse.Namespace) -> Iterator[str]:
    """The server's URL: the given one, or that of a server of our own."""
    if args.url:
        yield args.url
        return
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--data-dir", scratch]
        for name in ("model", "quantization", "device", "adapter_memory"):
            if (value := getattr(args, name)) is not None:
                flags += [f"--{name.replace('_', '-')}", value]
        with local_server([*flags, *args.server_flag]) as server:
            yield server.url


def register(url: str, adapters: RandomAdapters, names: Sequence[str]) -> None:
    """Upload adapter i by the i-th name; what the system has still to write is written then."""
    with tempfile.TemporaryDirectory() as scratch, Client(url) as client:
        bar = tqdm(names, f"uploading {'/'.join(adapters.methods)}", unit="adapter")
        for i, name in enumerate(bar):
            client.adapters.push(name, adapters.write(Path(scratch), i))
    os.sync()  # nobody writes gigabytes beside what is measured


def measure(
    url: str, cases: Sequence[Case], plan: Plan, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run the plan; a summary of each case.

    Raises SystemExit where a request of the warm-up fails.
    """
    phases: dict[str, list[Phase]] = {case.name: [] for case in cases}
    total = sum(len(requests) for by_case in plan for requests in by_case.values())
    with tqdm(total=total, unit="request") as bar:
        for i, by_case in enumerate(plan):
            for case in cases if i % 2 else cases[::-1]:
                bar.set_description(f"{case.name}, " + (f"round {i}" if i else "warm-up"))
                requests = by_case[case.name]
                phase = asyncio.run(
                    run_phase(url, requests, args.streams, args.timeout, bar.update)
                )
                if i:
                    phases[case.name].append(phase)
                elif bad := [o for o in phase.outcomes if o.status != "ok"]:
                    raise SystemExit(f"{bad[0].model}: {bad[0].status} {bad[0].message}")
    found = [{"case": case.name, **summarize(phases[case.name])} for case in cases]
    for one in found:
        one |= ratios(one["rounds"], found[0]["rounds"])
    return found


def measure_peft(
    model_folder: Path,
    adapters: RandomAdapters,
    cases: Sequence[Case],
    plan: Plan,
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    """The plan's rounds through HF peft in batches of a row a stream: output tok/s, by case."""
    phases = [(case, by_case[case.name]) for by_case in plan[1:] for case in cases]
    batches: list[Batch] = []
    used: set[str] = set()
    for case, requests in phases:
        for i in range(0, len(requests), args.streams):
            rows = requests[i : i + args.streams]
            named = None if case.name == "base" else [row.model for row in rows]
            batches.append(Batch([row.prompt for row in rows], named))
            used.update(named or ())
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            name: adapters.write(Path(scratch) / name, i)
            for i, name in enumerate(adapter_names(args.registered))
            if name in used
        }
        seconds = iter(
            generate_batches(
                model_folder,
                folders,
                batches,
                num_output_tokens=args.output_tokens,
                num_threads=os.cpu_count() or 1,
                max_seconds=_PEFT_LOAD_SECONDS + args.timeout * len(batches),
                device=args.device or "cpu",
            )
        )
    found: dict[str, list[float]] = {case.name: [] for case in cases}
    for case, requests in phases:
        took = sum(next(seconds) for _ in range(0, len(requests), args.streams))
        found[case.name].append(len(requests) * args.output_tokens / took)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for. The server has ended when peft begins."""
    folder = resolve_model(args.model).path
    adapters = RandomAdapters(folder, args.methods, rank=args.rank)
    with target(args) as url:
        models = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"]
        cases = make_cases(args, models[0]["id"])
        if not args.url or args.upload:
            named = [case.models for case in cases if case.name in POPULARITIES]
            register(url, adapters, max(named, key=len, default=[]))
            if mixed := [case for case in cases if case.name == "mixed"]:
                every = RandomAdapters(folder, METHODS, rank=args.rank)
                register(url, every, mixed[0].models)
        max_len = models[0].get("max_model_len")
        if max_len is not None:
            max_len -= NUM_VIRTUAL_TOKENS
        plan = make_plan(args, cases, prompt_token_ids(folder), max_len)
        facts = health(url)
        found = measure(url, cases, plan, args)
    if args.against == "peft":
        speeds = measure_peft(folder, adapters, cases, plan, args)
        for one in found:
            rounds = speeds[one["case"]]
            speed = statistics.median(rounds)
            one["peft"] = {
                "output_tokens_per_s": speed,
                "ratio": one["output_tokens_per_s"] / speed,
                "rounds": rounds,
            }
    return {
        "machine": machine(argparse.Namespace(threads=os.cpu_count())),
        "server": facts,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "cases": found,
    }


# -- the table -------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """Print a table of the cases, then what belongs to each alone."""
    print(", ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    server = result["server"]
    print(", ".join(f"{k}: {server[k]}" for k in ("model", "quantization", "dtype") if k in server))
    row = "{:<9} {:>7} {:>5} {:>6} {:>17} {:>14} {:>17} {:>8} {:>6}".format
    print(row("", "", "", "", "TTFT, s", "ITL, ms", "E2E, s", "", ""))
    titles = ["tok/s", "ratio", "req/s", *["p50/p95/p99"] * 3, "fairness", "errors"]
    print(row("case", *titles))
    for case in result["cases"]:
        print(
            row(
                case["case"],
                cell(case, "output_tokens_per_s", 1),
                cell(case, "ratio", 2),
                cell(case, "requests_per_s", 2),
                "/".join(cell(case, f"ttft_p{p}_s", 2) for p in (50, 95, 99)),
                "/".join(cell(case, f"itl_p{p}_s", 0, 1000) for p in (50, 95, 99)),
                "/".join(cell(case, f"e2e_p{p}_s", 2) for p in (50, 95, 99)),
                cell(case["fairness"], "jain_index", 3),
                sum(case["errors"].values()),
            )
        )
    for case in result["cases"]:
        for line in remarks(case):
            print(f"{case['case']}: {line}")


def cell(figures: dict[str, Any], key: str, decimals: int, factor: float = 1.0) -> str:
    """A figure as text; a dash where there is none."""
    value = figures.get(key)
    return "-" if value is None else f"{value * factor:.{decimals}f}"


def remarks(case: dict[str, Any]) -> Iterator[str]:
    """Of one case, in lines: the quartiles of its ratio, its slowest and fastest adapter, loads,
    errors, and peft."""
    if len(case["rounds"]) > 1 and "ratio" in case:
        low, middle, high = (case[key] for key in ("ratio_p25", "ratio", "ratio_p75"))
        yield f"{middle:.3f} of the first case, half of the rounds from {low:.2f} to {high:.2f}"
    fair = case["fairness"]
    if fair.get("num_adapters", 0) > 1:
        ends = [
            f"{end} {fair[end]['model']} {fair[end]['output_tokens_per_s']:.2f} tok/s"
            for end in ("slowest", "fastest")
        ]
        yield f"{fair['num_adapters']} adapters, {', '.join(ends)}"
    if case.get("num_adapter_loads"):
        yield (
            f"{case['num_adapter_loads']:.0f} adapter loads and "
            f"{case['num_adapter_evictions']:.0f} evictions a round"
        )
    if case["errors"]:
        counts = ", ".join(f"{count} {status}" for status, count in case["errors"].items())
        yield f"errors of {case['num_requests']} requests: {counts}"
        yield from case["messages"]
    if "peft" in case:
        peft = case["peft"]
        yield (
            f"HF peft {peft['output_tokens_per_s']:.1f} tok/s, "
            f"the server {peft['ratio']:.2f} times as fast"
        )


# -- the flags -------------------------------------------------------------------------------------


def names_among(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Parses a comma list of different names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"a name is given twice: {text}")
        return names

    return parse


def number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Parses a positive number."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not over 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


def parser() -> argparse.ArgumentParser:
    count, positive = number(int), number(float)
    made = argparse.ArgumentParser(
        prog="python -m loadtests.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = made.add_argument_group("the server")
    group.add_argument("--model", help="as polypeft-serve's; of its tokens prompts are made")
    group.add_argument("--quantization", help="as polypeft-serve's")
    group.add_argument("--device", choices=["cpu", "cuda"], help="the server's, and peft's")
    group.add_argument("--adapter-memory", help="as polypeft-serve's")
    group.add_argument(
        "--server-flag", action="append", default=[], metavar="FLAG",
        help="any other flag of polypeft-serve, as --server-flag=--max-num-seqs=64; repeatable",
    )  # fmt: skip
    group.add_argument("--url", help="measure the server at this URL, and start none")
    group.add_argument("--models", type=lambda text: text.split(","), metavar="A,B,C",
                       help="with --url: names of adapters that the server has")  # fmt: skip
    group.add_argument("--upload", action="store_true", help="with --url: upload adapters to it")

    group = made.add_argument_group("the adapters")
    group.add_argument("--compare", "--popularity", type=names_among(CASES), metavar="CASE,…",
                       default=["base", "distinct"],
                       help=f"of {', '.join(CASES)}; default base,distinct")  # fmt: skip
    group.add_argument("--adapters", type=count, default=16,
                       help="of distinct and mixed; default 16")  # fmt: skip
    group.add_argument("--registered", type=count,
                       help="uploaded, and what the other cases spread over; "
                       "default as many as --adapters")  # fmt: skip
    group.add_argument("--methods", type=names_among(METHODS), default=["lora"],
                       metavar="METHOD,…",
                       help=f"of {', '.join(METHODS)}, in turn; default lora")  # fmt: skip
    group.add_argument("--rank", type=count, default=16,
                       help="of LoRA and DoRA, on all linear layers; default 16")  # fmt: skip
    group.add_argument("--zipf-s", type=positive, default=1.0, help="default 1.0")

    group = made.add_argument_group("the load")
    group.add_argument("--streams", type=count, default=16,
                       help="closed loop: each sends its next request when its last has ended; "
                       "default 16")  # fmt: skip
    how = group.add_mutually_exclusive_group()
    how.add_argument("--rate", type=positive,
                     help="open loop: requests a second, as a Poisson process")  # fmt: skip
    how.add_argument("--trace", type=Path, metavar="FILE",
                     help="open loop: arrivals and lengths of a CSV with the columns TIMESTAMP, "
                     "ContextTokens and GeneratedTokens (the Azure LLM inference traces); "
                     "requests over the context are left out")  # fmt: skip
    group.add_argument("--trace-speed", type=positive, default=1.0,
                       help="the trace's clock runs so many times as fast")  # fmt: skip
    group.add_argument("--requests", "--trace-requests", type=count,
                       help="of each case in a round, with --trace the file's first; "
                       "default three a stream")  # fmt: skip
    group.add_argument("--prompt-tokens", type=count, default=150, help="default 150")
    group.add_argument("--output-tokens", type=count, default=64, help="default 64")
    group.add_argument("--rounds", type=count, default=3, help="medians over them; default 3")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, choices and prompts")
    group.add_argument("--timeout", type=positive, default=600.0,
                       help="of one request, in seconds; default 600")  # fmt: skip

    group = made.add_argument_group("comparison and output")
    group.add_argument("--against", choices=["peft"],
                       help="then send the same requests through HF peft's mixed batch, a row a "
                       "stream, in float32; LoRA in a closed loop only")  # fmt: skip
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked against each other; exits with argparse's status where they disagree."""
    made = parser()
    args = made.parse_args(argv)
    args.requests = args.requests or 3 * args.streams
    args.registered = args.registered or args.adapters
    if args.registered < args.adapters:
        made.error("--registered: fewer than --adapters")
    if args.trace:
        try:
            read_trace(args.trace, 1, args.trace_speed, None)
        except (OSError, ValueError) as exc:
            made.error(f"--trace: {exc}")
    if args.url:
        for flag in ("quantization", "device", "adapter_memory", "server_flag"):
            if getattr(args, flag):
                made.error(f"--{flag.replace('_', '-')}: not with --url, which starts no server")
        if bool(args.models) == args.upload and args.compare != ["base"]:
            made.error("--url: name its adapters by --models, or add --upload (not both)")
        if args.models and "mixed" in args.compare:
            made.error("--compare: mixed needs adapters of ours: --upload in place of --models")
    elif args.models or args.upload:
        made.error("--models, --upload: only with --url")
    if args.against == "peft":
        if args.methods != ["lora"] or "mixed" in args.compare:
            made.error("--against peft: peft's mixed batch takes LoRA only")
        if args.url or args.rate or args.trace:
            made.error("--against peft: needs a server of our own and a closed loop")
        if args.rounds < 2:
            made.error("--against peft: needs --rounds of at least 2")
        if importlib.util.find_spec("peft") is None:
            made.error("--against peft: peft is not installed (pip install peft)")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    args = parse(argv)
    if args.json:  # a folder that is not there is better known before than after
        args.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run(args)
    except (ClientError, ModelSourceError, httpx.HTTPError, subprocess.TimeoutExpired) as exc:
        raise SystemExit(f"loadtests.serving: {exc}") from exc
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
