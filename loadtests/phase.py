"""Sends a phase's requests to a server and notes when their text arrives. Knows no figures.

It shares its processor with the server that it measures: events are counted, not parsed.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.traffic import Request

#: Counters of /health whose growth is reported of every phase.
_COUNTERS = (
    "num_adapter_loads",
    "num_adapter_evictions",
    "num_preemptions",
    "num_prefix_hit_tokens",
)

_HAS_TEXT = re.compile(rb'"text": ?"(?!")')
_HAS_USAGE = re.compile(rb'"usage": ?\{')


class EventReader:
    """Notes when text arrives in a stream of server-sent events; parses the usage only.

    Attributes:
        times: of each event with text, as they were fed.
        usage: OpenAI's usage object, once it came.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.usage: dict[str, Any] | None = None
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take in what arrived at `now`; events may be cut anywhere."""
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if _HAS_TEXT.search(event):
                self.times.append(now)
            if _HAS_USAGE.search(event):
                self.usage = json.loads(event.removeprefix(b"data:"))["usage"]


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times in seconds, of one clock.

    Attributes:
        status: "ok", an HTTP status, or in a word why there is none.
        due, end: when it was to be sent, when its stream ended.
        times: of each event with text.
        num_output: generated tokens by the server's count.
    """

    model: str
    status: str
    due: float
    end: float
    times: Sequence[float] = ()
    num_output: int = 0
    message: str = ""


async def ask(http: httpx.AsyncClient, request: Request, due: float, max_seconds: float) -> Outcome:
    """Stream one completion to its end, or for `max_seconds`."""
    body = {
        "model": request.model, "prompt": request.prompt, "max_tokens": request.slot.num_output,
        "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    reader, message = EventReader(), ""
    try:
        async with (
            asyncio.timeout(max_seconds),
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            status = str(response.status_code)
            if response.status_code == 200:
                async for data in response.aiter_raw():
                    reader.feed(data, time.perf_counter())
                status = "ok" if reader.usage is not None else "cut off"
            else:
                message = (await response.aread()).decode(errors="replace")[:500]
    except TimeoutError:
        status = "timeout"
    except httpx.TransportError as exc:
        status = type(exc).__name__
    num_output = reader.usage["completion_tokens"] if reader.usage is not None else 0
    end = time.perf_counter()
    return Outcome(request.model, status, due, end, tuple(reader.times), num_output, message)


@dataclass
class Phase:
    """One case in one round: its requests' outcomes, its wall time, the server's counters."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)


async def run_phase(
    url: str,
    requests: Sequence[Request],
    num_streams: int,
    max_seconds: float,
    on_end: Callable[[], object],
) -> Phase:
    """Send all requests: by streams where they have no arrival, else each when it is due.

    Args:
        num_streams: request k is sent by stream k modulo their number.
        max_seconds: for each request. on_end: called at the end of each.
    """
    phase = Phase()

    async def one(request: Request, due: float) -> None:
        phase.outcomes.append(await ask(http, request, due, max_seconds))
        on_end()

    async def stream(own: Sequence[Request]) -> None:
        for request in own:
            await one(request, time.perf_counter())

    async def later(request: Request, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        await one(request, due)

    async with httpx.AsyncClient(
        base_url=url,
        timeout=None,  # `ask` keeps the time
        limits=httpx.Limits(max_connections=None),
        headers={"Accept-Encoding": "identity"},
    ) as http:
        before, start = counters(url), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i in range(num_streams):
                own = [r for r in requests[i::num_streams] if r.slot.arrival is None]
                group.create_task(stream(own))
            for request in requests:
                if request.slot.arrival is not None:
                    group.create_task(later(request, start + request.slot.arrival))
        phase.seconds = time.perf_counter() - start
    after = counters(url)
    phase.counters = {name: after[name] - before[name] for name in before if name in after}
    return phase


def health(url: str) -> dict[str, Any]:
    """What /health says, if it says anything."""
    try:
        found = httpx.get(f"{url}/health", timeout=30).json()
    except (httpx.TransportError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def counters(url: str) -> dict[str, float]:
    found = health(url)
    return {name: found[name] for name in _COUNTERS if name in found}
