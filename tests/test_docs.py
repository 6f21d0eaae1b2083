"""The documents name every field, metric, path and error that there is, and no other."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from clients import errors
from server.api import pooling_schemas, schemas
from server.api.app import create_app
from server.api.fields import Strict
from server.metrics import COUNTERS, GAUGES, TIERED, AdapterUsage, Metrics
from tests import tiny

ROOT = Path(__file__).parents[1]
BOTH = "Both `POST /v1/completions` and `POST /v1/chat/completions`"


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def section(document: str, title: str) -> str:
    return text_of(document).split(f"\n## {title}\n")[1].split("\n## ")[0]


def in_first_column(text: str, pattern: str = r"`([\w:]+)") -> set[str]:
    """What the rows of the text's tables have between backticks in their first column."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(pattern, row)}


@pytest.mark.parametrize(
    ("request_type", "path"),
    [
        (schemas.CompletionRequest, "/v1/completions"),
        (schemas.ChatCompletionRequest, "/v1/chat/completions"),
    ],
)
def test_the_tables_have_every_field_of_a_generation(request_type: type[Strict], path: str) -> None:
    text = section("docs/api.md", BOTH) + section("docs/api.md", f"`POST {path}`")
    assert in_first_column(text) - {"include_usage"} == set(request_type.model_fields)


@pytest.mark.parametrize(
    ("document", "request_type"),
    [
        ("docs/api.md", schemas.TokenizeRequest),
        ("docs/api.md", schemas.DetokenizeRequest),
        ("docs/classification.md", pooling_schemas.ClassifyRequest),
        ("docs/classification.md", pooling_schemas.EmbeddingRequest),
        ("docs/operations.md", schemas.LoadLoraAdapter),
        ("docs/operations.md", schemas.UnloadLoraAdapter),
    ],
)
def test_the_text_names_every_field(document: str, request_type: type[Strict]) -> None:
    text = text_of(document)
    for name in request_type.model_fields:
        assert re.search(f'[`"]{name}[`"]', text), name


def test_the_table_has_every_metric() -> None:
    metrics = Metrics()
    metrics.update(dict.fromkeys([*GAUGES, *COUNTERS, *TIERED], 0))
    metrics.update_adapters(AdapterUsage())
    there_are = {
        family.name.removeprefix("polypeft_") + ("_total" if family.type == "counter" else "")
        for family in metrics.registry.collect()
    }
    assert in_first_column(section("docs/operations.md", "Metrics")) == there_are


def test_the_readme_has_every_path() -> None:
    app = create_app(partial(pytest.fail, "nothing is loaded"), tiny.settings(Path("nowhere")))
    paths = {re.sub(r"\{model\}$", "", path).rstrip("/") for path in app.openapi()["paths"]}
    table = text_of("README.md").split("### Endpoints\n\n")[1].split("\n\n")[0]
    assert in_first_column(table, r"(/[\w/{}]+)`") == paths


def test_the_table_has_every_error_of_the_client() -> None:
    table = section("docs/client.md", "Python").split("### Errors\n")[1].split("### ")[0]
    classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert in_first_column(table) == classes - {"ClientError"}  # which stands before it
