"""All that needs a GPU, in one run and one report: `python -m loadtests.gpu_check`

Tests of the Triton kernels and of the engine on the card, then the measurements: kernels against
torch, serving against its base and against HF peft. Each step is a process with a time limit; one
that fails does not stop the rest. --out gets report.md, report.json and what each step wrote.

The exit status is 0 where every step passed, 1 where one did not, and 2 where there is no GPU:
nothing is run then, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

_PACKAGES = ("polypeft", "torch", "triton", "transformers", "bitsandbytes", "peft")
#: Of a step's output, in the report.
_TAIL_LINES = 15
_SECONDS_TO_DIE = 10


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        command: `{out}` stands for the report's folder, `{python}` for this interpreter.
        max_seconds: it is ended after so long.
        environment: set for it; None takes a variable away.
    """

    name: str
    command: Sequence[str]
    max_seconds: float
    environment: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step. `status` is its exit status, None where it was ended."""

    name: str
    result: Literal["passed", "failed", "timed out"]
    status: int | None
    seconds: float
    log: str
    tail: str


_SERVING = ("{python}", "-m", "loadtests.serving", "--device", "cuda")
STEPS: tuple[Step, ...] = (
    Step(
        "tests of the Triton kernels",
        ("{python}", "-m", "pytest", "-q", "tests/peftcore/triton"),
        1200,
        {"TRITON_INTERPRET": None},
    ),
    Step(
        "the engine's logits against HF peft's, on the GPU",
        ("{python}", "-m", "pytest", "-q", "tests/server/engine/test_parity.py"),
        1200,
        {"TRITON_INTERPRET": None, "POLYPEFT_TEST_DEVICE": "cuda"},
    ),
    Step(
        "CUDA graphs against eager steps, copies beside steps, no waiting in a step",
        ("{python}", "-m", "pytest", "-q", "tests/server/engine/test_graphs_and_eager.py",
         "tests/server/engine/test_on_gpu.py"),
        1200,
        {"TRITON_INTERPRET": None, "POLYPEFT_TEST_DEVICE": "cuda"},
    ),
    Step(
        "kernels against torch",
        (*("{python}", "-m", "loadtests.gpu", "--json", "{out}/kernels.json"),
         *("--plot", "{out}/kernels.png")),
        1200,
        {"TRITON_INTERPRET": None},
    ),
    Step(
        "serving: the base, 16 adapters, five methods",
        (*_SERVING, "--compare", "base,distinct,mixed", "--json", "{out}/serving.json"),
        1800,
    ),
    Step(
        "serving without CUDA graphs",
        (*_SERVING, "--compare", "base,distinct,mixed", "--json", "{out}/serving_eager.json"),
        1800,
        {"POLYPEFT_CUDA_GRAPHS": "false"},
    ),
    Step(
        "serving against HF peft",
        (*_SERVING, "--compare", "base,distinct", "--against", "peft",
         *("--json", "{out}/serving_peft.json")),
        1800,
    ),
)  # fmt: skip


def run_step(step: Step, number: int, out: Path) -> Outcome:
    """Run it to its end or its limit; all that it started ends with it."""
    log = out / f"{number}.log"
    words = {"{python}": sys.executable}
    command = [words.get(word, word.replace("{out}", str(out))) for word in step.command]
    variables = dict(os.environ)
    for name, value in step.environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=variables, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(step.max_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").rstrip().splitlines()
    result: Literal["passed", "failed", "timed out"] = (
        "timed out" if status is None else "failed" if status else "passed"
    )
    return Outcome(
        step.name, result, status, seconds, log.name, "\n".join(lines[-_TAIL_LINES:])
    )  # fmt: skip


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, by force where they do not go."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        try:
            process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def facts() -> dict[str, Any]:
    """The card, its driver, and the versions of what runs on it."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["memory_bytes"] = card.total_memory
        found["compute_capability"] = f"{card.major}.{card.minor}"
        found["multiprocessors"] = card.multi_processor_count
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        found["driver"] = done.stdout.split("\n")[0].strip() or None
    return found


def write_report(out: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """report.json and report.md in `out`."""
    report = {"facts": dict(about), "steps": [asdict(outcome) for outcome in outcomes]}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    lines = [f"# {about.get('card') or 'No card'}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "| step | result | seconds | log |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.1f} | {o.log} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}: {outcome.result}", "", "```", outcome.tail, "```"]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def check(steps: Sequence[Step], out: Path, about: Mapping[str, Any]) -> int:
    """Run all steps, one after another; the report is written anew after each. 0, or 1 where one
    did not pass."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, step in enumerate(steps, 1):
        print(f"{number}/{len(steps)} {step.name} …", end=" ", flush=True)
        outcomes.append(run_step(step, number, out))
        print(f"{outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_report(out, about, outcomes)
    print(f"{out / 'report.md'}")
    return int(any(outcome.result != "passed" for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, look for a GPU, run."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        print(
            f"gpu-check: torch {torch.__version__}, {built}, finds no GPU. Nothing was run and "
            "nothing was measured.",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(check(STEPS, args.out.absolute(), facts()))


if __name__ == "__main__":
    main()
