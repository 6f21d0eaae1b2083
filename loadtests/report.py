"""A run's plots and its page. Knows what summary.json says, and measures nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TEMPLATE = "report.html.jinja"
_PERCENTILES = (50, 95, 99)

Steps = Sequence[Mapping[str, Any]]


def plots(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """By the name of its file, every plot that there are points for."""
    steps = summary["steps"]
    made: dict[str, Callable[[], Figure | None]] = {
        "latency_over_load.png": lambda: latency_over_load(steps),
        "ttft_by_popularity.png": lambda: ttft_by_popularity(steps),
        "cache_hit_rate.png": lambda: cache_hit_rate(steps),
        "memory_over_time.png": lambda: memory_over_time(steps, summary["looks"]),
    }
    found = {name: make() for name, make in made.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def write(summary: Mapping[str, Any], out: Path) -> None:
    """The plots as PNG, and `report.html` with the same plots inside of it."""
    drawn = {}
    for name, figure in plots(summary).items():
        data = BytesIO()
        figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
        (out / name).write_bytes(data.getvalue())
        drawn[name] = base64.b64encode(data.getvalue()).decode()
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["number"] = _number
    page = environment.get_template(_TEMPLATE).render(summary=summary, plots=drawn)
    (out / "report.html").write_text(page, encoding="utf-8")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def latency_over_load(steps: Steps) -> Figure | None:
    """TTFT, E2E and throughput over the number of users."""
    points = [s for s in steps if s["kind"] == "load" and "ttft_p50_s" in s and "e2e_p50_s" in s]
    if not points:
        return None
    users = [s["users"] for s in points]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for axes, name, title in ((first, "ttft", "time to first token"), (second, "e2e", "whole")):
        for p in _PERCENTILES:
            axes.plot(users, [s[f"{name}_p{p}_s"] for s in points], "o-", label=f"p{p}")
        _label(axes, f"{title}, s", "users")
        axes.legend()
    third.plot(users, [s["output_tokens_per_s"] for s in points], "o-")
    _label(third, "output tokens/s", "users")
    for axes in (first, second, third):
        axes.set_xscale("log", base=2)
        axes.set_xticks(users, [str(n) for n in users])
    return figure


def ttft_by_popularity(steps: Steps) -> Figure | None:
    """A group of bars, the percentiles, for every popularity."""
    points = [s for s in _by_popularity(steps) if "ttft_p50_s" in s]
    if not points:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(_PERCENTILES)
    for i, p in enumerate(_PERCENTILES):
        at = [k + (i - 1) * width for k in range(len(points))]
        axes.bar(at, [s[f"ttft_p{p}_s"] for s in points], width, label=f"p{p}")
    axes.set_xticks(range(len(points)), [s["popularity"] for s in points])
    axes.legend()
    _label(axes, f"time to first token, s ({points[0]['users']} users)")
    return figure


def cache_hit_rate(steps: Steps) -> Figure | None:
    """Of admissions that found their adapter resident, for every popularity."""
    points = [s for s in _by_popularity(steps) if "adapter_hit_rate" in s]
    if not points:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(
        [s["popularity"] for s in points], [s["adapter_hit_rate"] for s in points], width=0.6
    )
    axes.bar_label(bars, [f"{s['adapter_hit_rate']:.1%}" for s in points])
    _label(axes, f"adapter cache hit rate ({points[0]['users']} users)")
    return figure


def memory_over_time(steps: Steps, looks: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The server's resident memory, and how many sequences it had; steps as bands."""
    if len(looks) < 2:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    seen = [look for look in looks if look["resident_mb"] is not None]
    upper.plot([look["seconds"] for look in seen], [look["resident_mb"] for look in seen])
    _label(upper, "resident memory, MB")
    for key in ("running", "waiting"):
        known = [look for look in looks if look[key] is not None]
        lower.plot([s["seconds"] for s in known], [s[key] for s in known], label=key)
    lower.legend()
    _label(lower, "sequences", "seconds")
    for i, step in enumerate(steps):
        for axes in (upper, lower):
            axes.axvspan(step["start_s"], step["end_s"], color=f"C{i % 10}", alpha=0.08)
    return figure


def _by_popularity(steps: Steps) -> Steps:
    """A step for each popularity, of one number of users: what is comparable.

    The popularity that loads were measured with is compared by its step of the same users.
    """
    others = [s for s in steps if s["kind"] == "popularity"]
    if not others:
        return [s for s in steps if s["kind"] == "load"][-1:]
    return [
        *(s for s in steps if s["kind"] == "load" and s["users"] == others[0]["users"]),
        *others,
    ]


def _label(axes: Axes, y: str, x: str | None = None) -> None:
    axes.set_ylabel(y)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    if x is not None:
        axes.set_xlabel(x)
