"""Training data: a file's rows made into prompts and completions, and these into token batches.

Knows files, templates and tokenizers; nothing of adapters.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: Label of a token that is not in the loss.
IGNORED = -100

#: How many problems of a data file one error lists.
_MAX_PROBLEMS = 10


class DataError(ValueError):
    """Rows of a data file that cannot be trained on; the message gives file, lines and reasons."""

    def __init__(self, path: Path, problems: list[tuple[int, str]]) -> None:
        lines = [f"{path}:{line}: {reason}" for line, reason in problems[:_MAX_PROBLEMS]]
        if len(problems) > _MAX_PROBLEMS:
            lines.append(f"… and {len(problems) - _MAX_PROBLEMS} more")
        super().__init__("\n".join(lines))
        self.problems = problems


@dataclass(frozen=True)
class Example:
    """One row of a data file: what the user says, what the model is to answer, and its line."""

    prompt: str
    completion: str
    line: int


@dataclass(frozen=True)
class Sequence:
    """An example in tokens. The loss is on `ids[prompt_len:]`; 0 < prompt_len < len(ids)."""

    ids: tuple[int, ...]
    prompt_len: int

    def __post_init__(self) -> None:
        assert 0 < self.prompt_len < len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: `[batch, len]` int64 each; labels are IGNORED off the loss."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def load_examples(
    path: str | Path, prompt: str = "{prompt}", completion: str = "{completion}"
) -> list[Example]:
    """Read every row of a data file.

    Args:
        path: `.jsonl` (one object a line), or `.csv` or `.tsv` with a header line.
        prompt, completion: templates; `{column}` stands for the row's value of that column.

    Raises:
        DataError: a row that is no object, lacks a column, or has an empty prompt or completion.
    """
    path = Path(path)
    examples: list[Example] = []
    problems: list[tuple[int, str]] = []
    for line, row in _rows(path):
        if isinstance(row, str):
            problems.append((line, row))
            continue
        try:
            example = Example(_fill(prompt, row), _fill(completion, row), line)
        except ValueError as exc:
            problems.append((line, str(exc)))
            continue
        for name, text in [("prompt", example.prompt), ("completion", example.completion)]:
            if not text.strip():
                problems.append((line, f"the {name} is empty"))
        examples.append(example)
    if not examples and not problems:
        problems.append((1, "the file holds no row"))
    if problems:
        raise DataError(path, problems)
    return examples


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Each row with its line number, from 1; a string in a row's place says what is wrong."""
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _jsonl_rows(path)
            case ".csv":
                yield from _table_rows(path, ",")
            case ".tsv":
                yield from _table_rows(path, "\t")
            case other:
                raise DataError(path, [(1, f"{other!r} is not one of .jsonl, .csv, .tsv")])
    except UnicodeDecodeError as exc:
        line = path.read_bytes().count(b"\n", 0, exc.start) + 1
        raise DataError(path, [(line, f"not UTF-8 text: {exc.reason}")]) from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    # The whole text at once, so that a decoding error's offset is the file's.
    for line, text in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as exc:
            yield line, f"not valid JSON: {exc}"
            continue
        yield line, row if isinstance(row, dict) else "a JSON object is expected"


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            yield line, f"not readable as a table: {exc}"
            continue
        if not values:
            continue
        if header is None:
            header = values
        elif len(values) != len(header):
            yield line, f"{len(values)} fields, where the header names {len(header)}"
        else:
            yield line, dict(zip(header, values, strict=True))


def _fill(template: str, row: Mapping[str, Any]) -> str:
    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in row:
            raise ValueError(f"no column {name!r} (the row has {', '.join(map(repr, row))})")
        value = row[name]
        if isinstance(value, dict | list | bool) or value is None:
            raise ValueError(f"column {name!r} holds {json.dumps(value)[:40]}, which is no text")
        return str(value)

    return re.sub(r"\{([^{}\s]+)\}", value_of, template)


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_len: int | None = None
) -> Sequence:
    """One user message and the assistant's answer to it, through the model's chat template.

    The prompt's tokens are exactly those that a server makes of the same message. Without a chat
    template the texts stand one after the other. What ends the turn is part of the completion.

    Raises:
        ValueError: longer than `max_len` tokens, or a chat template in which the conversation does
            not continue the prompt.
    """
    if tokenizer.chat_template is None:
        prompt_ids = tokenizer(example.prompt)["input_ids"]
        completion = example.completion + (tokenizer.eos_token or "")
    else:
        user = {"role": "user", "content": example.prompt}
        answer = {"role": "assistant", "content": example.completion}
        template = partial(tokenizer.apply_chat_template, tokenize=False)
        prompt = str(template([user], add_generation_prompt=True))
        whole = str(template([user, answer]))
        if not whole.startswith(prompt):
            raise ValueError("the model's chat template does not continue its prompt")
        completion = whole[len(prompt) :].rstrip()
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = (*prompt_ids, *tokenizer(completion, add_special_tokens=False)["input_ids"])
    if max_len is not None and len(ids) > max_len:
        raise ValueError(f"{len(ids)} tokens, over max_len of {max_len}")
    return Sequence(ids, len(prompt_ids))


def tokenize_all(
    path: Path, examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_len: int
) -> list[Sequence]:
    """`tokenize` for a whole file. Raises DataError with every line that is refused."""
    sequences: list[Sequence] = []
    problems: list[tuple[int, str]] = []
    for example in examples:
        try:
            sequences.append(tokenize(example, tokenizer, max_len))
        except ValueError as exc:
            problems.append((example.line, str(exc)))
    if problems:
        raise DataError(path, problems)
    return sequences


def collate(sequences: list[Sequence]) -> Batch:
    """Pad sequences into a batch; labels hold the completions' tokens only."""
    length = max(len(s.ids) for s in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, s in enumerate(sequences):
        input_ids[i, : len(s.ids)] = torch.tensor(s.ids)
        attention_mask[i, : len(s.ids)] = 1
        labels[i, s.prompt_len : len(s.ids)] = torch.tensor(s.ids[s.prompt_len :])
    return Batch(input_ids, attention_mask, labels)


def batches_of(
    sequences: list[Sequence], batch_size: int, rng: random.Random
) -> list[list[Sequence]]:
    """One epoch in random order, with sequences of like length together to save padding."""
    order = list(sequences)
    rng.shuffle(order)
    pool = 16 * batch_size
    batches: list[list[Sequence]] = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda s: len(s.ids))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches
