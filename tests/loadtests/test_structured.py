"""Schemas of the load test, and two hundred answers to them from a model that means nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from loadtests.schemas import random_schema
from loadtests.structured import ask, run, validity
from tests import tiny
from tests.serving import Served, serve

NUM_SCHEMAS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tiny.llama(max_position_embeddings=2048)
    with serve(tmp_path_factory.mktemp("served"), model, max_num_seqs=16) as served:
        yield served


def keywords(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            yield from keywords(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keywords(value)


def values(schema: Any, key: str) -> Iterator[Any]:
    if isinstance(schema, dict):
        if key in schema:
            yield schema[key]
        for part in schema.values():
            yield from values(part, key)
    elif isinstance(schema, list):
        for part in schema:
            yield from values(part, key)


def test_the_schemas_are_repeatable_and_of_all_kinds() -> None:
    assert random_schema(7) == random_schema(7)
    schemas = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    assert len({json.dumps(schema) for schema in schemas}) == NUM_SCHEMAS
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    counts = Counter(key for schema in schemas for key in keywords(schema))
    assert sum(schema_type == "number" for schema_type in values(schemas, "type")) >= 20
    for key in (
        "properties", "items", "prefixItems", "enum", "minimum", "exclusiveMaximum", "minLength",
        "pattern", "format", "anyOf", "$ref", "minItems",
    ):  # fmt: skip
        assert counts[key] >= 20, key


def test_two_hundred_answers_are_valid_among_unconstrained_ones(server: Served) -> None:
    schemas = [random_schema(i) if i % 2 else None for i in range(2 * NUM_SCHEMAS)]
    expected = server.complete("tiny", "abc", max_tokens=40)
    with httpx.Client(base_url=server.url, timeout=120) as http, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(
            lambda: [server.complete("tiny", "abc", max_tokens=40) for _ in range(10)]
        )
        _, answers = run(
            http, "tiny", schemas, streams=16, plain_tokens=20, max_tokens=1200, seed=0
        )
        assert set(beside.result()) == {expected}, "a row without a schema is as it was"
    assert [a.error for a in answers if a.error] == []
    assert len([a for a, s in zip(answers, schemas, strict=True) if s]) == NUM_SCHEMAS
    server.wait_idle()


def test_what_is_not_valid_is_told(server: Served) -> None:
    schema = {"type": "object", "required": ["a"]}
    assert validity(schema, '{"a": 1}', "stop") is None
    assert "'a'" in (validity(schema, "{}", "stop") or "")
    assert validity(schema, "{", "stop") is not None
    assert validity(schema, '{"a": 1}', "length") == "ended by length"
    with httpx.Client(base_url=server.url) as http:
        answer = ask(http, "tiny", random_schema(1), 0, max_tokens=1)
        assert answer.error == "ended by length"
        assert "multipleOf" in (ask(http, "tiny", {"multipleOf": 2}, 0, 9).error or "")
