"""What a classifier's classes are called, as an upload says it."""

from __future__ import annotations

import json
from typing import Any

from peftcore.config import MAX_CONFIG_BYTES
from peftcore.tasks import MAX_LABELS
from server.errors import BadRequest

_MAX_LABEL_LEN = 256


def parse_labels(data: bytes) -> tuple[str, ...] | None:
    """The labels in the order of the head's rows; None where the JSON is an object without any.

    Args:
        data: JSON: a list of names, `{"0": name, ...}`, or a model's whole config.json, of which
            `id2label` counts.

    Raises:
        BadRequest: anything else; or labels that are no distinct, short texts.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise _bad(f"{len(data)} bytes, over the limit of {MAX_CONFIG_BYTES}")
    try:
        given = json.loads(data)
        json.dumps(given, ensure_ascii=False).encode()  # they end up in answers: no surrogates
    except (ValueError, RecursionError) as exc:
        raise _bad(f"not valid JSON: {exc}") from None
    if isinstance(given, dict) and "model_type" in given:
        given = given.get("id2label")
    elif isinstance(given, dict) and "id2label" in given:
        given = given["id2label"]
    if given is None:
        return None
    labels = _in_order(given)
    if not all(isinstance(name, str) and 0 < len(name) <= _MAX_LABEL_LEN for name in labels):
        raise _bad(f"labels are texts of 1 to {_MAX_LABEL_LEN} characters")
    if len(set(labels)) < len(labels):
        raise _bad("two classes have one name")
    return tuple(labels)


def _in_order(given: Any) -> list[Any]:
    if isinstance(given, list) and 0 < len(given) <= MAX_LABELS:
        return given
    if isinstance(given, dict) and 0 < len(given) <= MAX_LABELS:
        names = [given.get(str(i)) for i in range(len(given))]
        if None not in names:
            return names
        raise _bad(f'the keys must be "0" to "{len(given) - 1}"')
    raise _bad('expected a list of names, {"0": name, ...}, or a model\'s config.json')


def _bad(message: str) -> BadRequest:
    return BadRequest(f"id2label: {message}", param="id2label")
