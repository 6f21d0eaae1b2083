"""What a classifier's classes are called, and what is asked of them, as an upload says it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peftcore.config import MAX_CONFIG_BYTES
from peftcore.tasks import MAX_LABELS
from server.errors import BadRequest

_MAX_LABEL_LEN = 256


#: transformers': one class of all; each class by itself; a number.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Labels:
    """What is known of a head's rows, in their order. None: nobody said."""

    names: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None


def parse_labels(data: bytes) -> Labels:
    """What is said of a classifier's classes.

    Args:
        data: JSON: a list of names, `{"0": name, ...}`, or a model's whole config.json, of which
            `id2label` and `problem_type` count.

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
    problem_type = None
    if isinstance(given, dict) and given.keys() & {"model_type", "id2label", "problem_type"}:
        problem_type, given = given.get("problem_type"), given.get("id2label")
        if problem_type not in (None, *get_args(ProblemType)):
            raise _bad(f"problem_type is one of {', '.join(get_args(ProblemType))}")
    return Labels(None if given is None else _names(given), problem_type)


def _names(given: Any) -> tuple[str, ...]:
    names = _in_order(given)
    if not all(isinstance(name, str) and 0 < len(name) <= _MAX_LABEL_LEN for name in names):
        raise _bad(f"labels are texts of 1 to {_MAX_LABEL_LEN} characters")
    if len(set(names)) < len(names):
        raise _bad("two classes have one name")
    return tuple(names)


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
