"""`polypeft top`: a live table of the adapters and the load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clients.cli.adapters import where
from clients.cli.common import errors_to_exit, out, print_json, size
from clients.client import Client
from clients.metrics import Snapshot, share
from clients.results import Adapter

#: Endpoints whose requests are load; those that look, as this command's own, are none.
_WORK = ("/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/embeddings")
#: Lines of a terminal that the adapters do not get.
_OTHER_LINES = 6


@dataclass(frozen=True)
class Sample:
    """What the server said at one time, in seconds of a clock that only goes forward."""

    time: float
    metrics: Snapshot
    adapters: Sequence[Adapter]

    @classmethod
    def take(cls, client: Client) -> Sample:
        metrics = Snapshot(client.metrics())
        return cls(time.monotonic(), metrics, client.adapters.list())


@dataclass(frozen=True)
class AdapterLoad:
    """One adapter's row."""

    name: str
    method: str
    resident: str
    num_running: int
    num_requests: int
    requests_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True)
class Load:
    """Between two samples. Rates a second; what the server does not tell is None.

    Attributes:
        requests_per_s: of generation, classification and embedding.
        kv_use: share of the KV cache's blocks that are held.
        adapter_hit_rate: of the admissions between the two that needed an adapter.
        adapters: the busiest first.
    """

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    num_running: float | None
    num_waiting: float | None
    kv_use: float | None
    adapter_bytes: float | None
    adapter_capacity_bytes: float | None
    adapter_hit_rate: float | None
    adapters: Sequence[AdapterLoad]

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Load:
        seconds = after.time - before.time
        now = after.metrics

        def rate(name: str, **labels: str) -> float:
            return now.growth(before.metrics, name, **labels) / seconds

        hits = now.growth(before.metrics, "polypeft_adapter_hits_total")
        loads = now.growth(before.metrics, "polypeft_adapter_loads_total")
        counts = {a.digest: a.num_requests for a in before.adapters}
        rows = [
            AdapterLoad(
                a.name,
                a.method,
                where(a),
                a.num_running,
                a.num_requests,
                max(0, a.num_requests - counts.get(a.digest, 0)) / seconds,
                rate("polypeft_adapter_tokens_total", adapter=a.name, kind="generated"),
            )
            for a in after.adapters
        ]
        return cls(
            requests_per_s=sum(rate("polypeft_requests_total", endpoint=path) for path in _WORK),
            prompt_tokens_per_s=rate("polypeft_prompt_tokens_total"),
            output_tokens_per_s=rate("polypeft_generated_tokens_total"),
            num_running=now.get("polypeft_running_sequences"),
            num_waiting=now.get("polypeft_waiting_sequences"),
            kv_use=share(now.get("polypeft_kv_blocks_used"), now.get("polypeft_kv_blocks")),
            adapter_bytes=now.get("polypeft_adapter_bytes", tier="device"),
            adapter_capacity_bytes=now.get("polypeft_adapter_capacity_bytes", tier="device"),
            adapter_hit_rate=share(hits, hits + loads),
            adapters=sorted(rows, key=_busiest_first),
        )


def _busiest_first(row: AdapterLoad) -> tuple[float, int, int, str]:
    return (-row.requests_per_s, -row.num_running, -row.num_requests, row.name)


def top(
    context: typer.Context,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.05, help="Seconds between two looks.")
    ] = 2.0,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Look so often, then end.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a look, for scripts.")
    ] = False,
) -> None:
    """Watch the adapters and the load, live; Ctrl-C ends it.

    Rates are of the time since the last look. RESIDENT says where an adapter's bytes lie. A row's
    requests are those that named the adapter.
    """
    client: Client = context.obj
    with errors_to_exit():
        last = Sample.take(client)
        shown: Group | None = None
        on_screen = out.is_terminal and not as_json
        with Live(console=out, auto_refresh=False, screen=on_screen) as live:
            num_looks = 0
            try:
                while count is None or num_looks < count:
                    time.sleep(interval)
                    sample = Sample.take(client)
                    load = Load.between(last, sample)
                    last, num_looks = sample, num_looks + 1
                    if as_json:
                        print_json(asdict(load))
                    else:
                        shown = render(load, out.height - _OTHER_LINES)
                        live.update(shown, refresh=True)
            except KeyboardInterrupt:
                pass
        if on_screen and shown is not None:  # the screen has taken it away
            out.print(shown)


def render(load: Load, max_rows: int) -> Group:
    """The load in two lines, and a row an adapter as far as they fit."""
    capacity = load.adapter_capacity_bytes
    memory = "-" if load.adapter_bytes is None else size(load.adapter_bytes)
    head = Text(
        f"{load.requests_per_s:.1f} requests/s   {load.output_tokens_per_s:.0f} output tokens/s   "
        f"{load.prompt_tokens_per_s:.0f} prompt tokens/s\n"
        f"running {_count(load.num_running)}   waiting {_count(load.num_waiting)}   "
        f"KV cache {_percent(load.kv_use)}   adapters {memory}"
        + (f" of {size(capacity)}" if capacity else "")
        + f"   adapter hits {_percent(load.adapter_hit_rate)}\n"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("ADAPTER", "METHOD", "RESIDENT", "RUNNING", "REQUESTS", "REQ/S", "TOK/S"):
        right = column in ("RUNNING", "REQUESTS", "REQ/S", "TOK/S")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    shown = load.adapters[: max(1, max_rows)]
    for row in shown:
        table.add_row(
            Text(row.name),
            row.method,
            row.resident,
            str(row.num_running),
            str(row.num_requests),
            f"{row.requests_per_s:.1f}",
            f"{row.output_tokens_per_s:.0f}",
        )
    left = len(load.adapters) - len(shown)
    return Group(head, table, Text(f"and {left} more" if left else "", style="dim"))


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
