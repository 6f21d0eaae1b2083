"""One step of a run: locust with so many users for so long, and what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loadtests.figures import figures, percentiles
from loadtests.load import BACKGROUND, GENERATING, Load, Told, read_outcomes
from loadtests.monitor import Monitor, cache_figures, memory_growth
from loadtests.phase import Outcome, Phase

_ROOT = Path(__file__).parents[1]
_USERS = Path(__file__).parent / "users.py"

#: As users.py has it, which cannot be imported where sockets are not to be patched.
_LOAD_VARIABLE = "POLYPEFT_LOAD"
#: Seconds that users get to end their requests in when the time is up.
_STOP_SECONDS = 60
#: Seconds that locust may take beside all this before it is ended.
_LOCUST_SECONDS = 60

#: Asked too much: the user's fault, which the server is to tell.
REFUSED = "429"


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        kind: what it is a point of.
        num_users: who are not in the background.
        weights: of their classes, by name.
        seconds: of load; of a replay the most.
        background: whether an uploader and a flipper work beside the others.
    """

    kind: Literal["load", "popularity", "replay", "soak"]
    popularity: str
    num_users: int
    weights: Mapping[str, int]
    seconds: float
    background: bool

    @property
    def name(self) -> str:
        if self.kind == "replay":
            return f"trace, {self.popularity}"
        return f"{self.kind}, {self.popularity}, {self.num_users} users"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())


def run_step(
    step: Step, load: Load, url: str, monitor: Monitor, out: Path, warm_up: float
) -> dict[str, Any]:
    """Run locust to its end; what the step comes to.

    Args:
        load: its popularity and its file of outcomes are the step's.
        out: locust's own reports and the outcomes are put there.
        warm_up: seconds at its start whose requests do not count as measured.

    Raises RuntimeError: locust failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    told_path = (out / f"{step.slug}.jsonl").absolute()
    load = replace(load, popularity=step.popularity, outcomes=str(told_path))
    load_path = load.write(out / f"{step.slug}.load.json")
    start = monitor.seconds()
    _locust(step, url, load_path, out)
    looks = monitor.between(start, monitor.seconds())
    load_path.unlink()  # its token ids are most of what it says
    told = list(read_outcomes(told_path))
    return {
        "name": step.name,
        "kind": step.kind,
        "popularity": step.popularity,
        "users": step.num_users,
        "start_s": start,
        "end_s": monitor.seconds(),
        **summarize(told, None if step.kind == "replay" else step.seconds, warm_up),
        **cache_figures(looks),
        "memory_growth_mb": memory_growth(looks),
    }


def _locust(step: Step, url: str, load_path: Path, out: Path) -> None:
    background = BACKGROUND if step.background else ()
    config = [
        *({"user_class_name": name, "weight": weight} for name, weight in step.weights.items()),
        *({"user_class_name": name, "fixed_count": 1} for name in background),
    ]
    num_users = str(step.num_users + len(background))
    command = [
        *(sys.executable, "-m", "locust", "-f", str(_USERS), *step.weights, *background),
        *("--headless", "--host", url, "--users", num_users, "--spawn-rate", num_users),
        *("--run-time", f"{max(1, round(step.seconds))}s", "--stop-timeout", str(_STOP_SECONDS)),
        *("--config-users", json.dumps(config), "--exit-code-on-error", "0", "--only-summary"),
        *("--html", str(out / f"{step.slug}.html"), "--json-file", str(out / step.slug)),
    ]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, _LOAD_VARIABLE: str(load_path.absolute())}
    max_seconds = step.seconds + _STOP_SECONDS + _LOCUST_SECONDS
    log_path = out / f"{step.slug}.log"
    with log_path.open("w") as log:
        ended = subprocess.run(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=max_seconds
        )
    if ended.returncode:
        raise RuntimeError(f"locust failed, see {log_path}: {log_path.read_text()[-1000:]}")


def summarize(told: Sequence[Told], seconds: float | None, warm_up: float) -> dict[str, Any]:
    """What requests come to: figures of those that generate, how long classes take, and counts.

    Args:
        seconds: of a closed loop, whose last requests run on after it; None counts all to the end.
        warm_up: seconds at the start that are not measured; failures count all the same.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for t in told:
        counts[t.user][t.outcome.status] += 1
    failures = Counter(t.outcome.status for t in told if t.outcome.status not in ("ok", REFUSED))
    messages = {t.outcome.message[:200] for t in told if t.outcome.status not in ("ok", REFUSED)}
    outcomes = [t.outcome for t in told if t.user in GENERATING]
    classes = [t.outcome for t in told if t.user == "Classify" and t.outcome.status == "ok"]
    return {
        **(measured(outcomes, seconds, warm_up) if outcomes else {}),
        **percentiles("classify", [o.end - o.due for o in classes]),
        "num_requests": len(told),
        "num_refused": sum(t.outcome.status == REFUSED for t in told),
        "num_failures": failures.total(),
        "failures": dict(failures),
        "messages": sorted(messages)[:5],
        "by_user": {user: dict(found) for user, found in sorted(counts.items())},
    }


def measured(outcomes: Sequence[Outcome], seconds: float | None, warm_up: float) -> dict[str, Any]:
    """`figures` of what was due, and rates of what arrived, between warm-up and end."""
    first = min(o.due for o in outcomes)
    start = first + warm_up
    end = max(o.end for o in outcomes) if seconds is None else first + seconds
    found = figures(Phase([o for o in outcomes if start <= o.due <= end], end - start))
    for total in ("output_tokens", "seconds", "tokens_per_event"):
        found.pop(total, None)
    done = [o for o in outcomes if o.status == "ok"]
    tokens = sum(
        o.num_output * sum(start <= t <= end for t in o.times) / len(o.times)
        for o in done
        if o.times
    )
    found["output_tokens_per_s"] = tokens / (end - start)
    found["requests_per_s"] = sum(start <= o.end <= end for o in done) / (end - start)
    return found
