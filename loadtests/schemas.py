"""Random JSON schemas whose answers end: nested, with bounds, patterns, unions and references."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_PATTERNS = (r"^[a-z]{2,6}$", r"^[A-Z]{2}-[0-9]{3}$", r"^(red|green|blue)$", r"^#[0-9a-f]{6}$")
_NAMES = ("id", "name", "kind", "size", "tags", "parts", "state", "note", "at", "price")


def random_schema(seed: int, max_depth: int = 3) -> Schema:
    """An object's schema; the same for the same seed. Its longest answers have some hundred
    characters, so that a model that rambles ends too."""
    rng = random.Random(seed)
    definitions = {"leaf": _scalar(rng), "pair": _object(rng, 1, {})}
    schema = _object(rng, max_depth, definitions)
    return {**schema, "$defs": definitions}


def _any(rng: random.Random, depth: int, definitions: Schema) -> Schema:
    kinds = ["scalar"] * 3
    if depth > 0:
        kinds += ["object", "array", "tuple", "anyOf"]
    if definitions:
        kinds += ["$ref"]
    match rng.choice(kinds):
        case "object":
            return _object(rng, depth - 1, definitions)
        case "array":
            low = rng.randint(0, 2)
            items = _any(rng, depth - 1, definitions)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 1}
        case "tuple":
            parts = [_any(rng, 0, definitions) for _ in range(2)]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
        case "anyOf":
            return {"anyOf": [_any(rng, depth - 1, definitions), {"type": "null"}]}
        case "$ref":
            return {"$ref": f"#/$defs/{rng.choice(sorted(definitions))}"}
        case _:
            return _scalar(rng)


def _object(rng: random.Random, depth: int, definitions: Schema) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth, definitions) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _scalar(rng: random.Random) -> Schema:
    match rng.randrange(9):
        case 0:
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        case 1:
            low = rng.randint(-9, 9)
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 90}
        case 2:
            return {"enum": [rng.randint(0, 9), "one", None, True, {"a": [1]}][: rng.randint(1, 5)]}
        case 3:
            low = rng.randint(0, 4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)}
        case 4:
            return {"type": "string", "pattern": rng.choice(_PATTERNS)}
        case 5:
            return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))}
        case 6:
            low = rng.randint(-9, 9)
            return {"type": "number", "minimum": low + 0.25, "maximum": low + rng.randint(1, 300)}
        case 7:
            return {"type": rng.choice(("boolean", "null"))}
        case _:
            return {"type": ["boolean", "null"], "description": "yes, no or not known"}
