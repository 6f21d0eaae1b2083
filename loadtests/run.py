"""Users, as locust has them, against a server of many adapters: `python -m loadtests.run`

Starts polypeft-serve on a free port (or takes a server by --url), uploads random adapters, and
lets locust's users chat, complete and classify, while one user uploads adapters and deletes them
and another flips names that are in use. One after another there are steps of

    load         --users, a step each, with the first of --popularities
    popularity   the others of --popularities, with the last of --users (or at saturation)
    replay       --trace: arrivals and lengths of a recorded trace, adapters by zipf
    soak         --soak: so many seconds more of the first popularity

What comes of it lies in --out: report.html with its plots inside, summary.json, the plots as PNG,
and locust's own reports. Exits with 1 where a threshold is broken, and says which.

    failures     anything but an answer or 429, uploads and flips included
    TTFT         from when a request was due to its first event with text
    ITL          between two events with text of one answer
    hit rate     of admissions, those that found their adapter on the device

examples:
    # latency over load, four popularities, in about three minutes; room for half of the adapters
    python -m loadtests.run --users 1,2,4,8,16 --adapters 32 --adapter-memory 160MiB
    # step up until throughput no longer grows, then soak there for ten minutes
    python -m loadtests.run --find-saturation --popularities zipf --soak 600 --max-memory-growth 20
    # the sample of the Azure trace, four times as fast, with prompts of at most 256 tokens
    python -m loadtests.run --users 4 --popularities zipf --trace sample --trace-speed 4 \\
        --max-prompt-tokens 256
    # fail where it is slower than this
    python -m loadtests.run --users 8 --popularities zipf --max-ttft-p95 2 \\
        --min-tokens-per-second 200
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from clients.client import Client
from clients.errors import ClientError, NotFound
from loadtests.adapters import CLASSIFIER, NUM_VIRTUAL_TOKENS, RandomAdapters
from loadtests.load import Load
from loadtests.local_server import local_server
from loadtests.monitor import Look, Monitor
from loadtests.run_flags import CLASSES, parse
from loadtests.serving import adapter_names, prompt_token_ids, register
from loadtests.steps import Step, run_step
from loadtests.thresholds import Threshold, check, saturation
from loadtests.traffic import clip, read_trace
from loadtests.training import machine
from peftcore.sources.resolve import ModelSourceError, resolve_model

_WORDS = Path(__file__).parent / "words.txt"

#: Of a server that does not tell its longest context, in tokens.
_USUAL_LEN = 2048
#: Of our own, where classes are asked for.
_NUM_CLASSIFIERS = 4
#: Folders that uploads take turns with.
_NUM_UPLOADS = 6
#: Names that are flipped, the most popular ones, and the weights that each takes turns with.
_NUM_FLIPPED, _NUM_FLIPS = 4, 2


@dataclass(frozen=True)
class Target:
    """A server; `pid` of its process, where it is ours."""

    url: str
    pid: int | None


@contextmanager
def target(args: argparse.Namespace) -> Iterator[Target]:
    if args.url:
        yield Target(args.url, None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--data-dir", scratch]
        for name in ("model", "quantization", "adapter_memory"):
            if (value := getattr(args, name)) is not None:
                flags += [f"--{name.replace('_', '-')}", value]
        with local_server([*flags, *args.server_flag]) as server:
            yield Target(server.url, server.pid)


# -- the load --------------------------------------------------------------------------------------


@contextmanager
def prepared(args: argparse.Namespace, model_folder: Path, url: str) -> Iterator[Load]:
    """Adapters uploaded, and what the users need to know; a server by --url loses them after."""
    with Client(url) as client:
        max_len = client.max_model_len() or _USUAL_LEN
    names = adapter_names(args.adapters)
    adapters = RandomAdapters(model_folder, args.methods, rank=args.rank)
    register(url, adapters, names)
    classifiers: list[str] = args.classifiers
    if args.mix.get("classify") and not classifiers:
        classifiers = [f"classifier-{i}" for i in range(_NUM_CLASSIFIERS)]
        register(url, RandomAdapters(model_folder, [CLASSIFIER], rank=args.rank), classifiers)
    numbers = iter(range(args.adapters, args.adapters + 100))
    with tempfile.TemporaryDirectory() as scratch:

        def folders(count: int) -> list[str]:
            each = [next(numbers) for _ in range(count)]
            return [str(adapters.write(Path(scratch) / str(i), i)) for i in each]

        try:
            yield Load(
                models=names,
                popularity="",
                outcomes="",
                zipf_s=args.zipf_s,
                classifiers=classifiers,
                prompt_tokens=args.prompt_tokens,
                output_tokens=args.output_tokens,
                prompt_words=_words_of(model_folder, args.prompt_tokens),
                token_ids=prompt_token_ids(model_folder),
                max_len=max_len - NUM_VIRTUAL_TOKENS,
                turns=args.turns,
                think_seconds=args.think,
                uploads=folders(_NUM_UPLOADS),
                flips={name: folders(_NUM_FLIPS) for name in names[:_NUM_FLIPPED]},
                upload_seconds=args.upload_seconds,
                flip_seconds=args.flip_seconds,
            )
        finally:
            if args.url:
                _remove(url, [*names, *(c for c in classifiers if c not in args.classifiers)])


def _words_of(model_folder: Path, num_tokens: int) -> int:
    """How many of our words have about so many tokens, by the model's tokenizer."""
    words = _WORDS.read_text().split()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    per_word = len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) / len(words)
    return max(1, round(num_tokens / per_word))


def _remove(url: str, names: Sequence[str]) -> None:
    with Client(url) as client:
        for name in names:
            with suppress(NotFound):
                client.adapters.remove(name)


# -- the steps -------------------------------------------------------------------------------------


class Run:
    """The steps of one run, and what came of them so far."""

    def __init__(
        self, args: argparse.Namespace, load: Load, server: Target, monitor: Monitor
    ) -> None:
        self.steps: list[dict[str, Any]] = []
        self.saturation_users: int | None = None
        self._args = args
        self._load = load
        self._server = server
        self._monitor = monitor

    def all(self) -> None:
        args = self._args
        first, *others = args.popularities
        self._loads(first)
        busiest = self.saturation_users or self.steps[-1]["users"]
        for popularity in others:
            self._closed("popularity", popularity, busiest, args.duration)
        if args.trace:
            self._replay()
        if args.soak:
            self._closed("soak", first, busiest, args.soak)

    def _loads(self, popularity: str) -> None:
        args, points = self._args, []
        users = args.users
        if args.find_saturation:
            users = [n for n in (2**i for i in range(20)) if n <= args.max_users]
        for num_users in users:
            found = self._closed("load", popularity, num_users, args.duration)
            points.append((num_users, found.get("output_tokens_per_s", 0.0)))
            if args.find_saturation:
                self.saturation_users = saturation(points, args.min_gain)
                if self.saturation_users is not None:
                    return
        if args.find_saturation:
            say(f"throughput still grows at {users[-1]} users; --max-users allows more")

    def _closed(self, kind: Any, popularity: str, num_users: int, seconds: float) -> dict[str, Any]:
        args = self._args
        weights = {CLASSES[word]: weight for word, weight in args.mix.items() if weight}
        return self._run(
            Step(kind, popularity, num_users, weights, args.warm_up + seconds, args.background)
        )

    def _replay(self) -> None:
        args = self._args
        slots = read_trace(args.trace, args.trace_requests, args.trace_speed, None)
        half = self._load.max_len // 2
        slots = clip(slots, min(args.max_prompt_tokens, half), min(args.max_output_tokens, half))
        arrivals = [slot.arrival for slot in slots if slot.arrival is not None]
        self._load = replace(self._load, slots=slots)
        seconds = arrivals[-1] + args.trace_seconds
        self._run(Step("replay", "zipf", 1, {"Replay": 1}, seconds, args.background))

    def _run(self, step: Step) -> dict[str, Any]:
        say(f"{step.name}, {step.seconds:.0f} s …")
        load = replace(self._load, seed=self._args.seed + len(self.steps))
        warm_up = 0.0 if step.kind == "replay" else self._args.warm_up
        out = self._args.out / "locust"
        found = run_step(step, load, self._server.url, self._monitor, out, warm_up)
        self.steps.append(found)
        say("    " + line_of(found))
        return found


def line_of(step: dict[str, Any]) -> str:
    """A step's figures in a line."""

    def figure(key: str, decimals: int, factor: float = 1.0) -> str:
        return f"{step[key] * factor:.{decimals}f}" if key in step else "-"

    return (
        f"{figure('output_tokens_per_s', 1)} tok/s, TTFT p50 {figure('ttft_p50_s', 2)} p95 "
        f"{figure('ttft_p95_s', 2)} s, E2E p50 {figure('e2e_p50_s', 2)} s, adapter hits "
        f"{figure('adapter_hit_rate', 1, 100)} %, {step['num_requests']} requests, "
        f"{step['num_refused']} refused (429), {step['num_failures']} failed"
        + (f": {step['failures']}" if step["failures"] else "")
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Threshold]]:
    """All that is asked for; what summary.json says, and the thresholds."""
    model_folder = resolve_model(args.model).path
    with target(args) as server, prepared(args, model_folder, server.url) as load:
        with Client(server.url) as client:
            facts = client.health()
        with Monitor(server.url, server.pid, args.interval) as monitor:
            steps = Run(args, load, server, monitor)
            steps.all()
    thresholds = check(
        steps.steps,
        max_failure_ratio=args.max_failure_ratio,
        max_ttft_p95=args.max_ttft_p95,
        min_tokens_per_second=args.min_tokens_per_second,
        max_memory_growth=args.max_memory_growth,
    )
    summary = {
        "passed": all(threshold.kept for threshold in thresholds),
        "command": shlex.join(["python", "-m", "loadtests.run", *args.given]),
        "machine": machine(argparse.Namespace(threads=os.cpu_count())),
        "server": facts,
        "num_adapters": args.adapters,
        "saturation_users": steps.saturation_users,
        "thresholds": [{**asdict(t), "kept": t.kept} for t in thresholds],
        "steps": steps.steps,
        "looks": [_look(look) for look in monitor.looks],
    }
    return summary, thresholds


def _look(look: Look) -> dict[str, float | None]:
    seen = look.metrics
    return {
        "seconds": round(look.seconds, 3),
        "resident_mb": look.resident_mb,
        "running": None if seen is None else seen.get("polypeft_running_sequences"),
        "waiting": None if seen is None else seen.get("polypeft_waiting_sequences"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run, write the report. Exits with 1 where a threshold is broken."""
    args = parse(argv, __doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        summary, thresholds = run(args)
    except (ClientError, ModelSourceError, RuntimeError, httpx.HTTPError,
            subprocess.TimeoutExpired) as exc:  # fmt: skip
        raise SystemExit(f"loadtests.run: {exc}") from exc
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    from loadtests import report

    report.write(summary, args.out)
    for threshold in thresholds:
        print(threshold)
    print(args.out / "report.html")
    if not summary["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
