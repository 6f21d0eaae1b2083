"""Where one engine step's time goes. `python -m loadtests.step`

Runs the engine in this process, without HTTP: a batch of streams is prefilled and decoded, once for
warming up and then --repeats times, with a clock around every kernel and every part of the step.
Decode steps are told apart from steps that prefill. Figures are medians over the steps of all
repeats, in milliseconds; the clocks themselves add about 0.2 ms a step.

    schedule, prepare   chunks for the step; rows, segments and tables for the model
    linear              the base's matrices
    adapters            what the linear kernels take longer with adapters than without
    attention, norms, gates
    python              what is left of the model's pass: transformers' own code, Python, and the
                        few small operators that are torch's
    sample
    detokenize          text of tokens
    deliver             what else is done for each token: stops, results

    python -m loadtests.step --quantization nf4 --streams 16
    python -m loadtests.step --streams 1 --adapters 1 --json step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loadtests.in_process import InProcess, Run, in_process
from peftcore.ops.cpu import kernels, kernels_status
from server.tokenization import Detokenizer

#: Part of a step → the kernels whose time it is; a layer in one launch tells its parts' itself.
_KERNELS = {
    "linear": ("linear", "add_adapters_", "scale_input"),
    "attention": ("attention",),
    "norms": ("rms_norm",),
    "gates": ("gate_",),
}
_PARTS = ("schedule", "prepare", *_KERNELS, "python", "sample", "detokenize", "deliver")

#: Each step's seconds by part, and whether it is a decode step.
Steps = list[dict[str, float]]


class Clock:
    """Seconds by part; parts of one step are collected until the step ends."""

    def __init__(self) -> None:
        self.current: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.current[part] += time.perf_counter() - start

        return call

    def take(self) -> dict[str, float]:
        taken, self.current = self.current, defaultdict(float)
        if kernels() is not None:
            for part, seconds in kernels().take_layer_seconds().items():
                taken[part] += seconds
        return dict(taken)


@contextmanager
def clocked(clock: Clock, world: InProcess) -> Iterator[None]:
    """Clocks around the kernels and the engine's parts."""
    engine = world.engine
    places: list[tuple[Any, str, str]] = [
        (engine.scheduler, "schedule", "schedule"),
        (engine.runner, "execute", "execute"),
        (engine.runner.loaded.model, "forward", "model"),
        (engine.sampler, "sample", "sample"),
        (engine, "_advance", "deliver"),
    ]
    places += [(Detokenizer, name, "detokenize") for name in ("push", "finish")]
    if kernels() is not None:
        places += [(kernels(), name, part) for part, names in _KERNELS.items() for name in names]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, part in places:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def steps_of(clock: Clock, world: InProcess, run: Callable[[], Run]) -> Steps:
    """Each step of a run: its parts in seconds, `total`, and whether it is a decode step."""
    steps: Steps = []
    step = world.engine.step

    def recording() -> Any:
        clock.take()
        start = time.perf_counter()
        prefills = any(not seq.num_output_tokens for seq in world.engine.live)
        outputs = step()
        total = time.perf_counter() - start
        parts = clock.take()
        if "model" in parts:
            inside = sum(parts.get(part, 0.0) for part in _KERNELS)
            parts["python"] = parts["model"] - inside
            parts["prepare"] = parts["execute"] - parts["model"]
            parts["deliver"] = parts.get("deliver", 0.0) - parts.get("detokenize", 0.0)
            steps.append({**parts, "total": total, "decode": float(not prefills)})
        return outputs

    world.engine.step = recording  # type: ignore[method-assign]
    try:
        run()
    finally:
        world.engine.step = step  # type: ignore[method-assign]
    return steps


def _median(steps: Steps, part: str, decode: bool) -> float:
    """Milliseconds; nothing where there is no such step."""
    return 1e3 * statistics.median(
        [s.get(part, 0.0) for s in steps if s["decode"] == decode] or [0]
    )


def table(steps: Steps, base: Steps, *, decode: bool) -> dict[str, float]:
    """Median milliseconds by part of the steps of one kind; `base`: the same without adapters."""
    if not any(s["decode"] == decode for s in steps):
        return {}
    median = {part: _median(steps, part, decode) for part in (*_PARTS, "total")}
    if any(s["decode"] == decode for s in base):
        own = _median(base, "linear", decode)
        median["adapters"] = max(0.0, median["linear"] - own)
        median["linear"] = min(median["linear"], own)
    return {part: round(value, 3) for part, value in median.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, object] = {
        "quantization": args.quantization,
        "activations": args.activations,
        "kv_cache_dtype": args.kv_cache_dtype,
        "adapter_dtype": args.adapter_dtype,
        "num_threads": args.threads,
        "max_num_seqs": max(args.streams, 1),
    }
    if args.model:
        settings["model"] = args.model
    with in_process(settings, num_adapters=args.adapters, rank=args.rank) as world:

        def run(adapters: bool, seed: int) -> Run:
            return world.run(
                streams=args.streams, prompt_tokens=args.prompt_tokens,
                output_tokens=args.output_tokens, adapters=adapters, seed=seed,
            )  # fmt: skip

        cases = [False, True] if args.adapters else [False]
        seeds = count()  # a prompt that was seen before would be in the prefix cache
        for adapters in cases:
            run(adapters, next(seeds))
        runs: dict[bool, list[Run]] = {adapters: [] for adapters in cases}
        steps: dict[bool, Steps] = {adapters: [] for adapters in cases}
        clock = Clock()

        def parts(adapters: bool) -> Steps:
            return steps_of(clock, world, lambda: run(adapters, next(seeds)))

        for _ in tqdm(range(args.repeats), desc="repeats", disable=args.quiet):
            for adapters in cases:
                runs[adapters].append(run(adapters, next(seeds)))
                with clocked(clock, world):
                    steps[adapters] += parts(adapters)
    result: dict[str, Any] = {
        "kernels": kernels_status(), "threads": torch.get_num_threads(),
        "quantization": args.quantization, "streams": args.streams, "adapters": args.adapters,
        "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens,
    }  # fmt: skip
    for adapters in cases:
        decodes = [seconds for r in runs[adapters] for seconds in r.decode_steps]
        result["with adapters" if adapters else "base"] = {
            "output_tokens_per_second": statistics.median(
                r.tokens_per_second for r in runs[adapters]
            ),
            "decode_step_ms": 1e3 * statistics.median(decodes),
            "decode_tokens_per_second": args.streams / statistics.median(decodes),
            "decode_parts_ms": table(steps[adapters], steps[False], decode=True),
            "prefill_parts_ms": table(steps[adapters], steps[False], decode=False),
        }
    return result


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['streams']} streams, {result['prompt_tokens']} prompt and "
        f"{result['output_tokens']} output tokens, {result['quantization']}, "
        f"{result['threads']} threads, kernels: {result['kernels']}"
    )
    for case in ("base", "with adapters"):
        if case not in result:
            continue
        found = result[case]
        print(
            f"\n{case}: {found['output_tokens_per_second']:.1f} output tok/s, decode step "
            f"{found['decode_step_ms']:.2f} ms ({found['decode_tokens_per_second']:.1f} tok/s)"
        )
        columns = {"decode": found["decode_parts_ms"], "prefill": found["prefill_parts_ms"]}
        print(f"{'ms a step':12}" + "".join(f"{name:>10}" for name in columns))
        parts = (*_PARTS[:3], "adapters", *_PARTS[3:], "total")
        for part in parts:
            if any(part in column for column in columns.values()):
                values = (column.get(part) for column in columns.values())
                cells = ("" if value is None else f"{value:.2f}" for value in values)
                print(f"{part:12}" + "".join(f"{cell:>10}" for cell in cells))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="as polypeft-serve's; the default model by default")
    parser.add_argument("--quantization", choices=("int8", "nf4", "none"), default="int8")
    parser.add_argument(
        "--activations", choices=("auto", "float", "int16", "int8"), default="auto",
        help="as polypeft-serve's",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "float32", "float16"), default="auto",
        help="as polypeft-serve's",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-dtype", choices=("auto", "float", "int8"), default="auto",
        help="as polypeft-serve's",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument(
        "--adapters", type=int, default=16, help="LoRA on all linear layers; 0: none"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    result = measure(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
