"""Answers to many JSON schemas, and what following them costs. `python -m loadtests.structured`

Starts a server and sends one batch of requests three ways: --requests of them, every second with a
JSON schema of its own and the others without; all without; and the mixed batch again once its
grammars are compiled. Each answer to a schema must be valid under it, by the library jsonschema.
Output tokens are compared at the same lengths: requests without a schema get as many tokens as the
schemas' answers had in the median. Rounds of the ways follow one another; figures are medians.

    python -m loadtests.structured --requests 400 --rounds 3 --json structured.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from loadtests.local_server import local_server
from loadtests.schemas import random_schema

PROMPT = "Describe an item of a shop's stock as JSON."
#: Ways in the order of a round.
WAYS = ("first", "compiled", "plain")


@dataclass(frozen=True)
class Answer:
    """`error`: why the answer is not what its schema asks for, or None."""

    num_tokens: int
    seconds: float
    error: str | None = None


def validity(schema: dict[str, Any], text: str, finish_reason: str | None) -> str | None:
    """Why a text is not valid under a schema, or None."""
    import jsonschema

    if finish_reason != "stop":
        return f"ended by {finish_reason}"
    try:
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError) as exc:
        return str(exc).splitlines()[0]
    return None


def ask(
    http: httpx.Client, model: str, schema: dict[str, Any] | None, seed: int, max_tokens: int
) -> Answer:
    """One chat; with a schema its answer is checked, without one it has `max_tokens` tokens."""
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": PROMPT}], "seed": seed,
        "max_tokens": max_tokens,
    }  # fmt: skip
    if schema is None:
        body["ignore_eos"] = True
    else:
        form = {"name": "item", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    start = time.perf_counter()
    answer = http.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - start
    if answer.status_code != 200:
        return Answer(0, seconds, answer.text[:300])
    found = answer.json()
    choice, num_tokens = found["choices"][0], found["usage"]["completion_tokens"]
    error = schema and validity(schema, choice["message"]["content"], choice["finish_reason"])
    return Answer(num_tokens, seconds, error or None)


def run(
    http: httpx.Client,
    model: str,
    schemas: Sequence[dict[str, Any] | None],
    *,
    streams: int,
    plain_tokens: int,
    max_tokens: int,
    seed: int,
) -> tuple[float, list[Answer]]:
    """All requests, `streams` at once; seconds in all, and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        answers = list(
            pool.map(
                lambda i: ask(
                    http, model, schemas[i], seed + i,
                    plain_tokens if schemas[i] is None else max_tokens,
                ),
                range(len(schemas)),
            )
        )  # fmt: skip
    return time.perf_counter() - start, answers


def measure(args: argparse.Namespace) -> dict[str, Any]:
    flags = ["--quantization", args.quantization, "--max-num-seqs", str(args.streams)]
    if args.model:
        flags += ["--model", args.model]
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    errors: list[str] = []
    num_valid = num_asked = 0
    with (
        tempfile.TemporaryDirectory() as data,
        local_server([*flags, "--data-dir", data]) as server,
        httpx.Client(base_url=server.url, timeout=600) as http,
    ):
        model = http.get("/v1/models").json()["data"][0]["id"]
        options = {"streams": args.streams, "max_tokens": args.max_tokens}
        run(http, model, [None] * args.streams, plain_tokens=8, seed=0, **options)
        for r in tqdm(range(args.rounds), desc="rounds", disable=args.quiet):
            first = r * args.requests
            mixed = [
                random_schema(args.seed + first + i) if i % 2 else None
                for i in range(args.requests)
            ]
            plain_tokens = args.plain_tokens
            for way in WAYS:
                schemas = [None] * len(mixed) if way == "plain" else mixed
                seconds, answers = run(
                    http, model, schemas, plain_tokens=plain_tokens, seed=first, **options
                )
                num_output = sum(a.num_tokens for a in answers)
                rounds[way].append(
                    {
                        "output_tokens_per_second": num_output / seconds,
                        "seconds": seconds,
                        "output_tokens": num_output,
                        "request_seconds_p50": statistics.median(a.seconds for a in answers),
                    }
                )
                asked = [a for a, s in zip(answers, schemas, strict=True) if s is not None]
                num_asked += len(asked)
                num_valid += sum(a.error is None for a in asked)
                errors += [a.error for a in answers if a.error is not None]
                if asked:
                    plain_tokens = round(statistics.median(a.num_tokens for a in asked))
    return {
        "requests": args.requests, "streams": args.streams, "rounds": args.rounds,
        "quantization": args.quantization, "schemas": args.rounds * (args.requests // 2),
        "answers_to_schemas": num_asked, "valid": num_valid, "errors": errors[:10],
        "ways": {
            way: {name: statistics.median(f[name] for f in found) for name in found[0]}
            for way, found in rounds.items()
        },
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['requests']} requests, {result['streams']} at once, every second with a schema "
        f"of its own; {result['quantization']}; medians of {result['rounds']} rounds"
    )
    print(
        f"{result['schemas']} schemas: {result['valid']} of {result['answers_to_schemas']} answers "
        "are valid"
    )
    for error in result["errors"]:
        print(f"  {error}")
    names = {"first": "mixed, first time", "compiled": "mixed, compiled", "plain": "no schema"}
    print(f"{'':20}{'output tok/s':>14}{'seconds':>10}{'tokens':>10}{'request p50 s':>16}")
    for way, found in result["ways"].items():
        print(
            f"{names[way]:20}{found['output_tokens_per_second']:14.1f}{found['seconds']:10.2f}"
            f"{found['output_tokens']:10.0f}{found['request_seconds_p50']:16.3f}"
        )


def main() -> None:
    """Parse the flags, measure, print; exit code 1 where an answer is not valid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as polypeft-serve's; the default model by default")
    parser.add_argument("--quantization", choices=("int8", "nf4", "none"), default="int8")
    parser.add_argument("--requests", type=int, default=100, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=1000, help="of an answer to a schema")
    parser.add_argument("--plain-tokens", type=int, default=48, help="of the others, at first")
    parser.add_argument("--seed", type=int, default=0, help="of the schemas and the draws")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["valid"] < result["answers_to_schemas"] or result["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
