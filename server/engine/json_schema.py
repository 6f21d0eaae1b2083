"""Which JSON schemas can be followed to the letter: what xgrammar would pass over is refused.

A schema that is let through has this property: every text of its grammar is valid under it. (Not
every valid text is in the grammar: properties that are not named come only where
`additionalProperties` asks for them, patterns match the whole string, and strings with a pattern
or a length have no escapes.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.errors import BadRequest

MAX_DEPTH = 64

#: Keywords that say nothing about what is valid, or stand where `$ref` finds them.
_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "example", "deprecated", "readOnly",
        "writeOnly", "discriminator", "$schema", "$id", "$comment", "$anchor", "$defs",
        "definitions",
    }
)  # fmt: skip
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_OF_TYPE: Mapping[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _OF_NUMBERS,
    "number": _OF_NUMBERS,
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "boolean": set(),
    "null": set(),
}
#: Each of these says the whole of what is valid; a keyword beside it would not be enforced.
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_FORMATS = frozenset(
    {
        "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid",
        "uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer",
    }
)  # fmt: skip


class _Refused(Exception):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path.removeprefix('.') or 'the schema'}: {reason}")


#: A character of a JSON string that stands for itself: all but controls, quotes, backslashes and
#: surrogates, by ranges (xgrammar's complements let encodings through that are no characters).
_PLAIN = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"


def followed_schema(source: str) -> Any:
    """The schema as xgrammar follows it to the letter.

    Lengths become patterns, because xgrammar lets raw control characters into strings with lengths.

    Raises:
        BadRequest: it cannot be followed; the message names the keyword.
    """
    try:
        schema = json.loads(source)
        _Check(schema).check(schema, "", 0)
        return schema
    except _Refused as exc:
        raise BadRequest(str(exc)) from None
    except RecursionError:
        raise BadRequest(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as exc:
        raise BadRequest(f"not JSON: {exc}") from None


class _Check:
    """One schema's check, which rewrites lengths; each `$ref`'s target is looked at once."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._seen: set[str] = set()

    def check(self, schema: Any, path: str, depth: int) -> None:
        if schema is True:
            return
        if not isinstance(schema, dict):
            raise _Refused(path, "a schema must be an object or true")
        if depth > MAX_DEPTH:
            raise _Refused(path, f"nested deeper than {MAX_DEPTH}")
        said = schema.keys() - _ANNOTATIONS
        whole = next((key for key in _WHOLE if key in said), None)
        if whole is not None:
            beside = {"type"} if whole in ("const", "enum") else set()
            self._only(said, beside | {whole}, path, f"not enforced beside {whole}")
            self._check_whole(whole, schema, path, depth)
        else:
            self._check_typed(schema, said, path, depth)

    @staticmethod
    def _only(said: set[str], allowed: set[str], path: str, reason: str) -> None:
        for key in sorted(said - allowed):
            raise _Refused(f"{path}.{key}", reason)

    def _check_whole(self, key: str, schema: dict[str, Any], path: str, depth: int) -> None:
        value, path = schema[key], f"{path}.{key}"
        match key:
            case "$ref":
                if not isinstance(value, str) or value not in self._seen:
                    target = self._followed(schema, path)
                    self._seen.add(value)
                    self.check(target, path, depth + 1)
            case "const" | "enum":
                values = value if key == "enum" else [value]
                if not isinstance(values, list) or not values:
                    raise _Refused(path, "at least one value is needed")
                types = _types(schema)
                if types and any(not _kinds_of(v) & types for v in values):
                    raise _Refused(path, "a value is not of the schema's type")
            case "allOf" if not isinstance(value, list) or len(value) != 1:
                raise _Refused(path, "only one schema is supported here")
            case _:
                if not isinstance(value, list) or not value:
                    raise _Refused(path, "a list of schemas is needed")
                for i, branch in enumerate(value):
                    self.check(branch, f"{path}[{i}]", depth + 1)
                if key == "oneOf":
                    self._check_disjoint(value, path)

    def _check_typed(self, schema: dict[str, Any], said: set[str], path: str, depth: int) -> None:
        types = _types(schema)
        for name in types:
            if name not in _OF_TYPE:
                raise _Refused(f"{path}.type", f"no such type: {name!r}")
        if not types:
            types = {name for name in ("object", "array") if said and said <= _OF_TYPE[name]}
        allowed = {"type"}.union(*(_OF_TYPE[name] for name in types))
        reason = "not enforced by this server" if types else "not enforced without a type"
        self._only(said, allowed, path, reason)
        if len({"pattern", "format"} & said) + bool({"minLength", "maxLength"} & said) > 1:
            raise _Refused(path, "of pattern, format and lengths only one can be enforced")
        if "format" in said and schema["format"] not in _FORMATS:
            raise _Refused(f"{path}.format", f"no such format: {schema['format']!r}")
        if {"minLength", "maxLength"} & said:
            low, high = schema.pop("minLength", 0), schema.pop("maxLength", None)
            if type(low) is not int or type(high) not in (int, type(None)) or low < 0:
                raise _Refused(path, "lengths must be whole numbers")
            if high is not None and high < low:
                raise _Refused(path, "maxLength is under minLength")
            schema["pattern"] = f"^{_PLAIN}{{{low},{'' if high is None else high}}}$"
        for name, part in _children(schema):
            self.check(part, f"{path}.{name}", depth + 1)
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in properties:
                raise _Refused(f"{path}.required", f"{name!r} is not among the properties")

    def _resolve(self, reference: Any, path: str) -> Any:
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            raise _Refused(path, "only references within the schema are followed: '#/…'")
        found = self._root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                raise _Refused(path, f"there is no {reference}")
            found = found[name]
        return found

    def _check_disjoint(self, branches: list[Any], path: str) -> None:
        """A text must match one branch and no other: they must differ in type, or by a tag."""
        followed = [self._followed(branch, path) for branch in branches]
        sides = [side if isinstance(side, dict) else {} for side in followed]
        for i, one in enumerate(sides):
            for other in sides[:i]:
                kinds = _types(one) and _types(other) and not _types(one) & _types(other)
                mixed = {"integer", "number"} <= _types(one) | _types(other)
                tags, others = _tags(one), _tags(other)
                tagged = any(not tags[k] & others[k] for k in tags.keys() & others.keys())
                if not tagged and (mixed or not kinds):
                    raise _Refused(path, "branches may overlap; use anyOf, or a const in each")

    def _followed(self, schema: Any, path: str) -> Any:
        """What a chain of references ends with."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            schema = self._resolve(schema["$ref"], path)
        raise _Refused(path, "refers to itself")


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas of a typed schema's parts."""
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise _Refused("properties", "an object is needed")
    for name, part in properties.items():
        yield f"properties.{name}", part
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _Refused("required", "a list of names is needed")
    prefix = schema.get("prefixItems", [])
    if not isinstance(prefix, list):
        raise _Refused("prefixItems", "a list of schemas is needed")
    for i, part in enumerate(prefix):
        yield f"prefixItems[{i}]", part
    for name in ("items", "additionalProperties"):
        if schema.get(name, False) is not False:
            yield name, schema[name]


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names."""
    if "type" in schema:
        types = schema["type"]
        names = types if isinstance(types, list) else [types]
        if not names or not all(isinstance(name, str) for name in names):
            raise _Refused("type", "a type's name is needed, or a list of them")
        return set(names)
    return set()


def _tags(schema: dict[str, Any]) -> dict[str, set[str]]:
    """The required properties that have only certain values, as JSON."""
    found = {}
    for name in schema.get("required", ()):
        part = schema.get("properties", {}).get(name)
        if isinstance(part, dict) and ("const" in part or "enum" in part):
            values = [part["const"]] if "const" in part else part["enum"]
            found[name] = {json.dumps(value, sort_keys=True) for value in values}
    return found


def _kinds_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}
