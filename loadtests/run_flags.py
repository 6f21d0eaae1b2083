"""The flags of `python -m loadtests.run`, checked against each other."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.adapters import METHODS
from loadtests.serving import names_among, number
from loadtests.traffic import POPULARITIES, read_trace

SAMPLE = Path(__file__).parent / "azure_conv_sample.csv"

#: The user classes that --mix weighs, by its words.
CLASSES = {"chat": "Chat", "completion": "Completion", "classify": "Classify"}


def counts(text: str) -> list[int]:
    """Parses a comma list of growing numbers."""
    found = [int(part) for part in text.split(",")]
    if found[0] < 1 or any(b <= a for a, b in itertools.pairwise(found)):
        raise argparse.ArgumentTypeError(f"{text}: give growing numbers over 0, as 1,4,16")
    return found


def mix(text: str) -> dict[str, int]:
    """Parses `chat=2,completion=1`."""
    found = {}
    for part in text.split(","):
        word, equals, weight = part.partition("=")
        if word not in CLASSES or not equals or not weight.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{part!r} is not NAME=WEIGHT with a name of {', '.join(CLASSES)}"
            )
        found[word] = int(weight)
    if not any(found.values()):
        raise argparse.ArgumentTypeError(f"{text}: every weight is 0")
    return found


def names(text: str) -> list[str]:
    return text.split(",")


def trace(text: str) -> Path:
    return SAMPLE if text == "sample" else Path(text)


def not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is under 0")
    return value


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m loadtests.run",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("loadtest"),
        metavar="FOLDER",
        help="made where it is not there; default loadtest",
    )
    _server_flags(made.add_argument_group("the server"))
    _load_flags(made.add_argument_group("the load"))
    _trace_flags(made.add_argument_group("a trace"))
    _threshold_flags(made.add_argument_group("thresholds"))
    return made


def _server_flags(group: Any) -> None:
    count, positive = number(int), number(float)
    group.add_argument("--model", help="as polypeft-serve's; of its tokens prompts are made")
    group.add_argument("--quantization", help="as polypeft-serve's")
    group.add_argument("--adapter-memory", help="as polypeft-serve's; little makes misses")
    group.add_argument(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="any other flag of polypeft-serve, as --server-flag=--max-num-seqs=64; repeatable",
    )
    group.add_argument(
        "--url",
        help="use the server at this URL, and start none; the adapters are "
        "deleted at the end. POLYPEFT_API_KEY is sent",
    )
    group.add_argument("--adapters", type=count, default=16, help="uploaded; default 16")
    group.add_argument(
        "--methods",
        type=names_among(METHODS),
        default=["lora"],
        metavar="METHOD,…",
        help=f"of {', '.join(METHODS)}, in turn; default lora",
    )
    group.add_argument("--rank", type=count, default=16, help="of LoRA and DoRA; default 16")
    group.add_argument(
        "--interval",
        type=positive,
        default=1.0,
        help="seconds between two looks at /metrics and memory; default 1",
    )


def _load_flags(group: Any) -> None:
    count, positive = number(int), number(float)
    group.add_argument(
        "--users",
        type=counts,
        default=[1, 2, 4, 8, 16],
        metavar="N,…",
        help="a step each; default 1,2,4,8,16",
    )
    group.add_argument(
        "--find-saturation",
        action="store_true",
        help="in place of --users: 1, 2, 4, … until throughput does not grow",
    )
    group.add_argument("--max-users", type=count, default=64, help="of that; default 64")
    group.add_argument(
        "--min-gain",
        type=positive,
        default=0.05,
        help="share that throughput must grow by; default 0.05",
    )
    group.add_argument(
        "--popularities",
        type=names_among(POPULARITIES),
        metavar="NAME,…",
        default=["zipf", "uniform", "skewed", "distinct"],
        help=f"of {', '.join(POPULARITIES)}; default zipf,uniform,skewed,distinct",
    )
    group.add_argument("--zipf-s", type=positive, default=1.0, help="default 1.0")
    group.add_argument(
        "--mix",
        type=mix,
        default={"chat": 1, "completion": 1},
        metavar="NAME=WEIGHT,…",
        help=f"users of {', '.join(CLASSES)}; default chat=1,completion=1",
    )
    group.add_argument(
        "--classifiers",
        type=names,
        default=[],
        metavar="A,B,C",
        help="the server's adapters to classify by; by default four are uploaded",
    )
    group.add_argument(
        "--duration",
        type=positive,
        default=20.0,
        help="seconds of a step that are measured; default 20",
    )
    group.add_argument(
        "--warm-up", type=not_negative, default=3.0, help="seconds before them; default 3"
    )
    group.add_argument(
        "--soak",
        type=not_negative,
        default=0.0,
        help="seconds more at the end, at saturation or the last of --users",
    )
    group.add_argument("--prompt-tokens", type=count, default=64, help="of a turn; default 64")
    group.add_argument("--output-tokens", type=count, default=32, help="of a turn; default 32")
    group.add_argument("--turns", type=count, default=3, help="of a chat; default 3")
    group.add_argument(
        "--think", type=not_negative, default=0.0, help="mean seconds of a user's pauses; default 0"
    )
    group.add_argument(
        "--background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="upload and flip adapters beside the load; default yes",
    )
    group.add_argument(
        "--upload-seconds", type=positive, default=5.0, help="between two; default 5"
    )
    group.add_argument("--flip-seconds", type=positive, default=3.0, help="between two; default 3")
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn; default 0")


def _trace_flags(group: Any) -> None:
    count, positive = number(int), number(float)
    group.add_argument(
        "--trace",
        type=trace,
        metavar="FILE",
        help="a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens "
        "(the Azure LLM inference traces), or the word sample",
    )
    group.add_argument(
        "--trace-requests", type=count, default=48, help="the first so many; default 48"
    )
    group.add_argument(
        "--trace-speed", type=positive, default=1.0, help="that time is divided by; default 1"
    )
    group.add_argument(
        "--max-prompt-tokens", type=count, default=512, help="longer prompts are cut; default 512"
    )
    group.add_argument(
        "--max-output-tokens", type=count, default=128, help="longer outputs are cut; default 128"
    )
    group.add_argument(
        "--trace-seconds",
        type=positive,
        default=120.0,
        help="after the last arrival, for its answers; default 120",
    )


def _threshold_flags(group: Any) -> None:
    positive = number(float)
    group.add_argument(
        "--max-failure-ratio",
        type=not_negative,
        default=0.0,
        help="failures, but 429, of all requests; default 0",
    )
    group.add_argument("--max-ttft-p95", type=positive, metavar="SECONDS", help="of every step")
    group.add_argument(
        "--min-tokens-per-second",
        type=positive,
        metavar="N",
        help="output tokens, of the best step",
    )
    group.add_argument(
        "--max-memory-growth",
        type=not_negative,
        metavar="MB",
        help="resident, of the longest step, from its second quarter to its "
        "last; the first is the warm-up",
    )


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The flags, checked against each other; exits with argparse's status where they disagree."""
    made = parser(description)
    args = made.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    if args.classifiers and not args.mix.get("classify"):
        made.error("--classifiers: needs a weight of classify in --mix")
    if args.url:
        for flag in ("quantization", "adapter_memory", "server_flag"):
            if getattr(args, flag):
                made.error(f"--{flag.replace('_', '-')}: not with --url, which starts no server")
        if args.max_memory_growth is not None:
            made.error("--max-memory-growth: the memory of a server by --url cannot be seen")
    if args.trace:
        try:
            read_trace(args.trace, 1, args.trace_speed, None)
        except (OSError, ValueError) as exc:
            made.error(f"--trace: {exc}")
    if importlib.util.find_spec("matplotlib") is None:
        made.error("the plots need matplotlib: pip install 'polypeft[loadtest]'")
    return args
