"""Does a cold adapter delay anybody else? `python -m loadtests.cold_adapters`

Warm streams ask resident adapters without a pause while extra requests come at a steady rate. In
one phase the extra requests name resident adapters too; in the other each names a cold one, which
is read from disk, compiled and copied in. The traffic is the same, so the difference in the warm
streams' time to first token is what loading costs those who do not wait for it. Phases alternate,
with fresh cold adapters in each round; medians over all rounds; JSON to stdout with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtests.adapters import make_lora
from loadtests.local_server import local_server
from peftcore.sources.resolve import resolve_model

_WORDS = (Path(__file__).parent / "words.txt").read_text().split()


@dataclass
class Phase:
    """Times to first token in seconds: of the warm streams, and of the extra requests."""

    warm: list[float] = field(default_factory=list)
    extra: list[float] = field(default_factory=list)


async def first_token(http: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> float:
    """Stream one completion; seconds until its first event."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True,
        "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    start, first = time.perf_counter(), None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line.startswith("data:"):
                first = time.perf_counter() - start
    assert first is not None
    return first


def prompt(rng: random.Random, num_words: int) -> str:
    """Words that no other request shares a prefix with."""
    return " ".join(rng.choices(_WORDS, k=num_words))


async def run_phase(
    url: str, warm: list[str], extra: list[str], args: argparse.Namespace, rng: random.Random
) -> Phase:
    """Warm streams until every extra request has ended."""
    phase, done = Phase(), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def stream() -> None:
            while not done.is_set():
                text = prompt(rng, args.prompt_words)
                ttft = await first_token(http, rng.choice(warm), text, args.output_tokens)
                phase.warm.append(ttft)

        async def one(model: str) -> None:
            phase.extra.append(await first_token(http, model, prompt(rng, args.prompt_words), 1))

        streams = [asyncio.create_task(stream()) for _ in range(args.streams)]
        extras = []
        for model in extra:
            await asyncio.sleep(args.interval)
            extras.append(asyncio.create_task(one(model)))
        await asyncio.gather(*extras)
        done.set()
        await asyncio.gather(*streams)
    return phase


def upload(url: str, name: str, folder: Path) -> None:
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    answer = httpx.post(f"{url}/v1/adapters", data={"name": name}, files=files, timeout=120)
    answer.raise_for_status()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run all rounds against a server of our own."""
    rng = random.Random(0)
    model_folder = resolve_model(args.model).path
    num_cold = args.rounds * args.cold
    with tempfile.TemporaryDirectory() as scratch:
        flags = [
            "--data-dir", f"{scratch}/data", "--adapter-memory", args.adapter_memory,
            "--adapter-host-memory", "0", "--max-num-seqs", "16",
        ]  # fmt: skip
        if args.model:
            flags += ["--model", args.model]
        with local_server(flags) as server:
            url = server.url
            warm = [f"warm-{i}" for i in range(args.streams)]
            cold = [f"cold-{i}" for i in range(num_cold)]
            for seed, name in enumerate(warm + cold):
                folder = make_lora(model_folder, Path(scratch) / "one", rank=args.rank, seed=seed)
                upload(url, name, folder)
            without, loading = Phase(), Phase()
            asyncio.run(run_phase(url, warm, warm, args, rng))  # warms up; not counted
            for i in range(args.rounds):
                fresh = cold[i * args.cold : (i + 1) * args.cold]
                resident = [rng.choice(warm) for _ in fresh]
                for phase, extra in ((without, resident), (loading, fresh)):
                    result = asyncio.run(run_phase(url, warm, extra, args, rng))
                    phase.warm += result.warm
                    phase.extra += result.extra
            num_loads = httpx.get(f"{url}/health").json()["num_adapter_loads"]
    return {
        "cold_loads": num_loads - len(warm),
        "warm_ttft_without_loads_s": statistics.median(without.warm),
        "warm_ttft_while_loading_s": statistics.median(loading.warm),
        "ratio": statistics.median(loading.warm) / statistics.median(without.warm),
        "warm_requests": [len(without.warm), len(loading.warm)],
        "resident_extra_ttft_s": statistics.median(without.extra),
        "cold_extra_ttft_s": statistics.median(loading.extra),
    }


def main() -> None:
    """Parse the flags, measure, print; ends with status 1 where --max-ratio is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as polypeft-serve's; the default model by default")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter, all linear layers")
    parser.add_argument("--cold", type=int, default=20, help="cold adapters in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=4, help="warm streams, an adapter each")
    parser.add_argument("--interval", type=float, default=0.5, help="of extra requests, in seconds")
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--adapter-memory", default="2GiB")
    parser.add_argument("--max-ratio", type=float, default=1.2, help="fail above this ratio")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:28} {value:.3f}" if isinstance(value, float) else f"{key:28} {value}")
    if float(str(result["ratio"])) > args.max_ratio:
        raise SystemExit(f"warm requests wait {result['ratio']:.2f} times as long: over the limit")


if __name__ == "__main__":
    main()
