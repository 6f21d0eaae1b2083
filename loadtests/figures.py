"""What the outcomes of requests come to: rates, percentiles, fairness. Times in seconds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtests.phase import Outcome, Phase


def figures(phase: Phase) -> dict[str, Any]:
    """Of the requests that were answered; times in seconds. A figure without a sample is absent."""
    done = [o for o in phase.outcomes if o.status == "ok"]
    num_output, num_events = sum(o.num_output for o in done), sum(len(o.times) for o in done)
    gaps = [b - a for o in done for a, b in zip(o.times, o.times[1:], strict=False)]
    found: dict[str, Any] = {
        "output_tokens_per_s": num_output / phase.seconds,
        "requests_per_s": len(done) / phase.seconds,
        "seconds": phase.seconds,
        "output_tokens": num_output,
        **percentiles("ttft", [o.times[0] - o.due for o in done if o.times]),
        **percentiles("itl", gaps),
        **percentiles("e2e", [o.end - o.due for o in done]),
        **phase.counters,
    }
    if num_events:
        found["tokens_per_event"] = num_output / num_events
    return found


def ratios(rounds: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of output tok/s to the same round of another case, so that what slows a machine down for a
    while counts on both sides: `ratio`, the median over rounds, and `ratio_p25`, `ratio_p75`.
    Nothing where the other case has answered nothing."""
    key = "output_tokens_per_s"
    pairs = [(a[key], b[key]) for a, b in zip(rounds, others, strict=True)]
    if not all(b for _, b in pairs):
        return {}
    low, middle, high = np.percentile([a / b for a, b in pairs], (25, 50, 75))
    return {"ratio": float(middle), "ratio_p25": float(low), "ratio_p75": float(high)}


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """`{name}_p50_s`, `_p95_s` and `_p99_s`, interpolated; nothing of nothing."""
    if not values:
        return {}
    return {f"{name}_p{p}_s": float(np.percentile(values, p)) for p in (50, 95, 99)}


def jain_index(values: Sequence[float]) -> float:
    """(Σx)² / (n Σx²): 1 where all are equal, 1/n where one has all."""
    squares = sum(x * x for x in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fairness(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Over the adapters' speeds: output tokens / E2E seconds of all that one was asked."""
    tokens: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for o in outcomes:
        if o.status == "ok":
            tokens[o.model] += o.num_output
            seconds[o.model] = seconds.get(o.model, 0.0) + o.end - o.due
    if not tokens:
        return {}
    speeds = {model: tokens[model] / seconds[model] for model in tokens}
    slowest, fastest = min(speeds, key=speeds.__getitem__), max(speeds, key=speeds.__getitem__)
    return {
        "jain_index": jain_index(list(speeds.values())),
        "num_adapters": len(speeds),
        "slowest": {"model": slowest, "output_tokens_per_s": speeds[slowest]},
        "fastest": {"model": fastest, "output_tokens_per_s": speeds[fastest]},
    }


def summarize(phases: Sequence[Phase]) -> dict[str, Any]:
    """Medians of the phases' figures; fairness and errors of all phases together."""
    rounds = [figures(phase) for phase in phases]
    outcomes = [o for phase in phases for o in phase.outcomes]
    names = [name for name in rounds[0] if all(name in r for r in rounds)]
    return {
        **{name: statistics.median(r[name] for r in rounds) for name in names},
        "num_requests": len(outcomes),
        "fairness": fairness(outcomes),
        "errors": dict(Counter(o.status for o in outcomes if o.status != "ok")),
        "messages": sorted({o.message for o in outcomes if o.message})[:5],
        "rounds": rounds,
    }
