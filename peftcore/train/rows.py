"""Reading data files: their rows, each with its line number, or what is wrong with them.

Knows files and templates; nothing of tokenizers or models.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".csv", ".tsv")

#: How many problems of a data file one error lists.
_MAX_PROBLEMS = 10


class DataError(ValueError):
    """Rows that cannot be trained on; the message gives file, lines and reasons."""

    def __init__(self, source: str | Path, problems: list[tuple[int, str]]) -> None:
        lines = [f"{source}:{line}: {reason}" for line, reason in problems[:_MAX_PROBLEMS]]
        if len(problems) > _MAX_PROBLEMS:
            lines.append(f"… and {len(problems) - _MAX_PROBLEMS} more")
        super().__init__("\n".join(lines))
        self.problems = problems


@dataclass(frozen=True)
class Row:
    """One row: its line, from 1, and its values by column; or a string that says what is wrong."""

    line: int
    values: Mapping[str, Any] | str


def read_rows(
    source: str | Path, split: str = "train", columns: Sequence[str] | None = None
) -> list[Row]:
    """Every row of a data set.

    Args:
        source: `.jsonl` (one object a line); `.csv` or `.tsv`; or else the name of a data set on
            the hub.
        split: of a hub data set.
        columns: names of the columns of a table whose first line is a row already.

    Raises:
        DataError: the file cannot be read as a whole, or holds no row.
    """
    path = Path(source)
    is_file = path.exists() or path.suffix.lower() in _SUFFIXES
    if not is_file and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        rows = _hub_rows(str(source), split)
    else:
        rows = list(_file_rows(path, columns))
    if not rows:
        raise DataError(source, [(1, "there is no row")])
    return rows


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as exc:  # the library raises many kinds, its own and the network's
        reason = f"no such file, and not to be had as a hub data set ({split}): {exc}"
        raise DataError(name, [(1, reason)]) from None
    return [Row(i, values) for i, values in enumerate(loaded, 1)]


def _file_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(path, [(1, "no such file")])
    try:
        # The whole text at once, so that a decoding error's offset is the file's.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = path.read_bytes().count(b"\n", 0, exc.start) + 1
        raise DataError(path, [(line, f"not UTF-8 text: {exc.reason}")]) from None
    match path.suffix.lower():
        case ".jsonl":
            yield from _jsonl_rows(text)
        case ".csv":
            yield from _table_rows(text, ",", columns)
        case ".tsv":
            yield from _table_rows(text, "\t", columns)
        case other:
            raise DataError(path, [(1, f"{other!r} is not one of {', '.join(_SUFFIXES)}")])


def _jsonl_rows(text: str) -> Iterator[Row]:
    for line, source in enumerate(text.split("\n"), 1):
        if not source.strip():
            continue
        try:
            values = json.loads(source)
        except ValueError as exc:
            yield Row(line, f"not valid JSON: {exc}")
            continue
        yield Row(line, values if isinstance(values, dict) else "a JSON object is expected")


def _table_rows(text: str, delimiter: str, columns: Sequence[str] | None) -> Iterator[Row]:
    bare = delimiter == "\t" and columns is not None  # such a file knows no quotes
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL,
    )
    header = None if columns is None else list(columns)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            yield Row(line, f"not readable as a table: {exc}")
            continue
        if not values:
            continue
        if header is None:
            header = values
        elif len(values) != len(header):
            yield Row(line, f"{len(values)} fields, where there are {len(header)} columns")
        else:
            yield Row(line, dict(zip(header, values, strict=True)))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """`template` with `{column}` replaced by the row's value of it.

    Raises ValueError for a column that is not there, or holds no text or number.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise ValueError(f"no column {name!r} (the row has {', '.join(map(repr, values))})")
        value = values[name]
        if isinstance(value, dict | list | bool) or value is None:
            raise ValueError(f"column {name!r} holds {json.dumps(value)[:40]}, which is no text")
        return str(value)

    return re.sub(r"\{([^{}\s]+)\}", value_of, template)
