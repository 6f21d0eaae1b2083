"""The files in deploy/ agree with what a server exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import serve

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "polypeft.json").read_text())

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_KEYWORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool"}


def expressions() -> list[str]:
    queries = [
        variable["query"]["query"]
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    ]
    panels = [target["expr"] for p in DASHBOARD["panels"] for target in p.get("targets", ())]
    return [*queries, *panels]


def names_in(expression: str) -> tuple[set[str], set[str]]:
    """Metrics and labels that a PromQL expression names."""
    labels: set[str] = set()
    variable = re.fullmatch(r"label_values\((\w+), (\w+)\)", expression)
    if variable:
        return {variable[1]}, {variable[2]}

    def take(match: re.Match[str]) -> str:
        inside = re.sub(r'"[^"]*"', "", match[1])
        labels.update(_NAME.findall(inside))
        return " "

    rest = re.sub(r"\[[^\]]*\]", " ", expression)  # ranges
    rest = re.sub(r"\{([^}]*)\}", take, rest)
    rest = re.sub(r"\bby \(([^)]*)\)", take, rest)
    rest = re.sub(r"[a-z_]+ *\(", "(", rest)  # functions
    rest = re.sub(r"\b(sum|avg|max|min|count)\b", " ", rest)
    return set(_NAME.findall(rest)) - _KEYWORDS, labels


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The samples of a server that has answered one request, each with its labels."""
    with serve(tmp_path_factory.mktemp("served"), adapter_host_memory="1MiB") as server:
        assert server.push("poet", server.make_adapter("lora-r4", 1)).status_code == 201
        server.complete("poet", "abc")
        text = server.http.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_each_expression_uses_what_the_server_exposes(
    exposed: dict[str, set[str]], expression: str
) -> None:
    metrics, labels = names_in(expression)
    assert metrics
    assert metrics <= set(exposed)
    assert labels - {"instance"} <= set().union(*(exposed[name] for name in metrics))


def test_every_metric_is_in_the_dashboard(exposed: dict[str, set[str]]) -> None:
    """But for parts of histograms, and what says the same in another way."""
    used = set().union(*(names_in(expression)[0] for expression in expressions()))
    ours = {name for name in exposed if not name.endswith(("_sum", "_count", "_created"))}
    assert ours - used == {"polypeft_adapter_requests_total", "vllm:lora_requests_info"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_checks_see_a_wrong_name() -> None:
    assert names_in('sum by (a, b) (rate(x_total{c=~"$d", e="f"}[5m])) / 2 > 0') == (
        {"x_total"},
        {"a", "b", "c", "e"},
    )


def jobs() -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]


def test_prometheus_scrapes_the_path_that_there_is() -> None:
    assert [job["metrics_path"] for job in jobs()] == ["/metrics"]
