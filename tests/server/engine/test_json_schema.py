"""Schemas that cannot be followed to the letter are refused, with the keyword's place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.engine.json_schema import followed_schema
from server.errors import BadRequest

CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    "schema",
    [
        {}, True, {"type": "object"}, {"type": ["string", "null"], "maxLength": 3},
        {"enum": [1, "a"]}, {"const": None}, {"type": "string", "const": "a"},
        {"type": "string", "pattern": "^a+$"}, {"type": "string", "format": "date"},
        {"title": "T", "description": "d", "default": 3, "type": "integer", "minimum": 3},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"allOf": [{"type": "integer"}]},
        {"oneOf": [{"type": "integer"}, {"type": "string"}]}, {"oneOf": [CAT, DOG]},
        {"oneOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/d"}], "$defs": {"c": CAT, "d": DOG}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}},
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"properties": {"a": {"items": {"type": "null"}}}},
        {"type": "array", "prefixItems": [{"type": "null"}], "items": False},
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    ],
)  # fmt: skip
def test_accepted(schema: Any) -> None:
    followed_schema(json.dumps(schema))


def deep(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ([], "the schema"), (False, "the schema"), ("x", "the schema"), (deep(70), "deeper"),
        ({"type": "integer", "multipleOf": 5}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"not": {}}, "not"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "properties.a.contains"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "object", "required": "a"}, "required"), ({"properties": 5}, "properties"),
        ({"type": "foo"}, "type"), ({"type": 5}, "type"), ({"minimum": 3}, "minimum"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "the schema"),
        ({"type": "string", "format": "colour"}, "format"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "the schema"),
        ({"type": "string", "minLength": 1.5}, "the schema"),
        ({"anyOf": [{"type": "integer"}], "minimum": 3}, "minimum"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "type": "null"}, "type"),
        ({"$ref": "#/$defs/a"}, "$ref"), ({"$ref": "http://a/b"}, "$ref"), ({"$ref": 5}, "$ref"),
        ({"$ref": "#"}, "$ref"), ({"enum": []}, "enum"), ({"enum": 5}, "enum"),
        ({"type": "string", "enum": ["a", 1]}, "enum"), ({"type": "null", "const": 0}, "const"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "allOf"), ({"anyOf": []}, "anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [CAT, CAT]}, "oneOf"), ({"oneOf": [CAT, {"type": "object"}]}, "oneOf"),
        ({"$defs": {"a": {"type": "array", "maxContains": 1}}, "items": {"$ref": "#/$defs/a"}},
         "items.$ref.maxContains"),
        ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "items.$ref"),
    ],
)  # fmt: skip
def test_refused(schema: Any, place: str) -> None:
    with pytest.raises(BadRequest, match=f"^{place}: |{place}".replace("$", r"\$")):
        followed_schema(json.dumps(schema))


@pytest.mark.parametrize("source", ["", "{", "[" * 100_000, '{"type": "null"', "nope"])
def test_no_json(source: str) -> None:
    with pytest.raises(BadRequest):
        followed_schema(source)
