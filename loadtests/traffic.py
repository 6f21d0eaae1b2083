"""What a load test asks for: whose requests, when, with which prompts. Sends nothing."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

#: How requests are spread over adapters; `choose` says what each means.
POPULARITIES = ("distinct", "identical", "uniform", "zipf", "skewed")

_TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Slot:
    """When a request comes and how long it is, lengths in tokens.

    Attributes:
        arrival: seconds after the phase's start; None in a closed loop, where a request comes when
            its stream's last one has ended.
    """

    arrival: float | None
    num_prompt: int
    num_output: int


@dataclass(frozen=True)
class Case:
    """Whose requests are compared: those for `models`, spread over them by a popularity."""

    name: str
    models: Sequence[str]
    popularity: str


@dataclass(frozen=True)
class Request:
    """One completion: for which model name, of which token ids, and its slot."""

    model: str
    prompt: tuple[int, ...]
    slot: Slot


class Prompts:
    """Random token ids. No two prompts begin with the same token, so none is found in a cache."""

    def __init__(self, token_ids: Sequence[int], rng: random.Random) -> None:
        """Args: token_ids: that prompts are made of; rng: draws them."""
        self._token_ids = list(token_ids)
        self._rng = rng
        self._firsts = iter(rng.sample(self._token_ids, len(self._token_ids)))

    def draw(self, num_tokens: int) -> tuple[int, ...]:
        """A prompt of exactly `num_tokens`.

        Raises ValueError when every token has begun one.
        """
        first = next(self._firsts, None)
        if first is None:
            raise ValueError(f"more prompts than the {len(self._token_ids)} tokens to begin with")
        return (first, *self._rng.choices(self._token_ids, k=num_tokens - 1))


def closed_loop(num_requests: int, num_prompt: int, num_output: int) -> list[Slot]:
    """Requests that wait for each other, all of one length."""
    return [Slot(None, num_prompt, num_output)] * num_requests


def poisson(
    num_requests: int, rate: float, num_prompt: int, num_output: int, rng: random.Random
) -> list[Slot]:
    """Independent arrivals, `rate` a second on average, all of one length."""
    slots, now = [], 0.0
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        slots.append(Slot(now, num_prompt, num_output))
    return slots


def read_trace(path: Path, num_requests: int, speed: float, max_len: int | None) -> list[Slot]:
    """The first requests of a trace in the CSV form of the Azure LLM inference traces.

    Columns: TIMESTAMP (ISO 8601), ContextTokens, GeneratedTokens. The first request comes at 0.

    Args:
        speed: by which the time between arrivals is divided.
        max_len: requests of more tokens, prompt and output together, are left out.

    Raises:
        ValueError: the file has other columns, or no request that fits.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not set(_TRACE_COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the columns {', '.join(_TRACE_COLUMNS)} are expected")
        rows = (
            (datetime.fromisoformat(time), int(num_prompt), int(num_output))
            for time, num_prompt, num_output in ([row[c] for c in _TRACE_COLUMNS] for row in reader)
        )
        fitting = (row for row in rows if max_len is None or row[1] + row[2] <= max_len)
        taken = list(islice(fitting, num_requests))
    if not taken:
        raise ValueError(f"{path}: has no request of at most {max_len} tokens")
    start = taken[0][0]
    return [Slot((time - start).total_seconds() / speed, n, m) for time, n, m in taken]


def clip(slots: Sequence[Slot], max_prompt: int, max_output: int) -> list[Slot]:
    """The same arrivals, with prompts and outputs of at most so many tokens."""
    return [
        Slot(
            s.arrival, max(1, min(s.num_prompt, max_prompt)), max(1, min(s.num_output, max_output))
        )
        for s in slots
    ]


def choose(
    popularity: str,
    num_requests: int,
    num_adapters: int,
    *,
    num_streams: int,
    zipf_s: float,
    rng: random.Random,
) -> list[int]:
    """The adapter's number of each request.

    distinct    stream i always uses adapter i (modulo their number); request k is of stream
                k modulo `num_streams`
    identical   all use adapter 0
    uniform     each adapter is as likely as any other
    zipf        adapter i has a probability in proportion to (i + 1) ** -zipf_s
    skewed      half of the requests use adapter 0, the others are uniform over the others

    Raises ValueError for another popularity.
    """
    everyone = range(num_adapters)
    match popularity:
        case "distinct":
            return [k % num_streams % num_adapters for k in range(num_requests)]
        case "identical":
            return [0] * num_requests
        case "uniform":
            weights = [1.0] * num_adapters
        case "zipf":
            weights = [(i + 1) ** -zipf_s for i in everyone]
        case "skewed":
            weights = [max(1.0, num_adapters - 1.0), *[1.0] * (num_adapters - 1)]
        case _:
            raise ValueError(f"{popularity!r} is not one of {', '.join(POPULARITIES)}")
    return rng.choices(everyone, weights, k=num_requests)


def requests_of(
    case: Case,
    slots: Sequence[Slot],
    prompts: Prompts,
    *,
    num_streams: int,
    zipf_s: float,
    rng: random.Random,
) -> list[Request]:
    """A request for every slot. Without streams, in an open loop, `distinct` takes all in turn."""
    num_models = len(case.models)
    is_open = slots[0].arrival is not None
    chosen = choose(
        case.popularity,
        len(slots),
        num_models,
        num_streams=num_models if is_open else num_streams,
        zipf_s=zipf_s,
        rng=rng,
    )
    return [
        Request(case.models[i], prompts.draw(slot.num_prompt), slot)
        for i, slot in zip(chosen, slots, strict=True)
    ]


__all__ = [
    "POPULARITIES",
    "Case",
    "Prompts",
    "Request",
    "Slot",
    "choose",
    "clip",
    "closed_loop",
    "poisson",
    "read_trace",
    "requests_of",
]
