"""Rows made into token samples: which tokens, and which of them are in the loss.

Knows chat templates and tokenizers; nothing of files or models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from peftcore.train.rows import DataError, Row, fill

#: Label of a token that is not in the loss.
IGNORED = -100

Form = Literal["chat", "prompt", "text", "label"]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGE_KEYS = {
    "role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One row in tokens.

    Attributes:
        input_ids: the tokens.
        labels: as many, IGNORED off the loss; or the class's number.
    """

    input_ids: list[int]
    labels: list[int] | int

    def __len__(self) -> int:
        return len(self.input_ids)

    def features(self) -> dict[str, Any]:
        """What a collator takes."""
        return {"input_ids": self.input_ids, "labels": self.labels}


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        prompt, completion: templates of a user message and the answer to it, `{column}` filled in.
        text, label: the columns of a text, and of its class.
        everything: the loss is on all tokens, not on the answers' alone.
        max_len: longest sample, in tokens.
        context: how many the model has room for; None where it does not say.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str = "text"
    label: str = "label"
    everything: bool = False
    max_len: int = 512
    context: int | None = None

    def form_of(self, values: Mapping[str, Any], classify: bool) -> Form:
        """The form of a file, by its first row."""
        if classify:
            return "label"
        if self.prompt is not None or self.completion is not None:
            return "prompt"
        if "messages" in values:
            return "chat"
        if "prompt" in values and "completion" in values:
            return "prompt"
        if self.text in values:
            return "text"
        raise ValueError(
            "none of messages; prompt and completion; or "
            f"{self.text} is among the columns ({', '.join(map(repr, values))}): say with "
            "--prompt and --completion what to make of them"
        )


def labels_of(rows: Sequence[Row], column: str) -> list[str]:
    """The classes of a data set, sorted; whole numbers by value, before words."""
    values = [row.values for row in rows if isinstance(row.values, Mapping)]
    names = {str(v[column]) for v in values if v.get(column) not in (None, "")}
    numbers = [name for name in names if re.fullmatch(r"-?[0-9]+", name)]
    return [*sorted(numbers, key=lambda n: (int(n), n)), *sorted(names.difference(numbers))]


def make_samples(
    source: str | Path,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    labels: Sequence[str] | None = None,
) -> list[Sample]:
    """Every row in tokens.

    Args:
        labels: the classes, where rows are to be classified.

    Raises:
        DataError: with every row that is refused, and why.
    """
    made: list[Sample] = []
    problems: list[tuple[int, str]] = []
    make: Callable[[Mapping[str, Any]], Sample] | None = None
    for row in rows:
        if isinstance(row.values, str):
            problems.append((row.line, row.values))
            continue
        try:
            if make is None:
                make = _maker(reading, row.values, tokenizer, labels)
            sample = make(row.values)
            if len(sample) > reading.max_len:
                raise ValueError(f"{len(sample)} tokens, over max_len of {reading.max_len}")
            if reading.context is not None and len(sample) > reading.context:
                room = f"the {reading.context} that the model has room for"
                raise ValueError(f"{len(sample)} tokens, over {room}")
        except ValueError as exc:
            problems.append((row.line, str(exc)))
            continue
        made.append(sample)
    if problems:
        raise DataError(source, problems)
    return made


def _maker(
    reading: Reading,
    first: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None,
) -> Callable[[Mapping[str, Any]], Sample]:
    match reading.form_of(first, labels is not None):
        case "label":
            assert labels is not None
            return lambda values: _labelled(values, tokenizer, reading, labels)
        case "text":
            return lambda values: _plain(_text(values, reading.text), tokenizer)
        case "chat":
            return lambda values: conversation(
                values.get("messages"), tokenizer, values.get("tools"), reading.everything
            )
    prompt, completion = reading.prompt or "{prompt}", reading.completion or "{completion}"

    def answered(values: Mapping[str, Any]) -> Sample:
        texts = {"prompt": fill(prompt, values), "completion": fill(completion, values)}
        for name, text in texts.items():
            if not text.strip():
                raise ValueError(f"the {name} is empty")
        return answer(texts["prompt"], texts["completion"], tokenizer, reading.everything)

    return answered


def _text(values: Mapping[str, Any], column: str) -> str:
    text = fill("{" + column + "}", values)
    if not text.strip():
        raise ValueError(f"column {column!r} is empty")
    return text


def _labelled(
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    labels: Sequence[str],
) -> Sample:
    name = fill("{" + reading.label + "}", values)
    if name not in labels:
        raise ValueError(f"{reading.label} {name!r} is not one of {', '.join(map(repr, labels))}")
    ids = tokenizer(_text(values, reading.text))["input_ids"]
    return Sample(list(ids), labels.index(name))


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> Sample:
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return _checked(Sample(ids, list(ids)))


def answer(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, everything: bool = False
) -> Sample:
    """One user message and the answer to it.

    The prompt's tokens are exactly those that a server makes of the same message. Without a chat
    template the texts stand one after the other. What ends the turn is part of the answer.
    """
    if tokenizer.chat_template is not None:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        return conversation(messages, tokenizer, None, everything)
    before = list(tokenizer(prompt)["input_ids"])
    text = completion + (tokenizer.eos_token or "")
    after = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = before + after
    return _checked(Sample(ids, list(ids) if everything else [IGNORED] * len(before) + after))


def conversation(
    messages: Any,
    tokenizer: PreTrainedTokenizerBase,
    tools: Any = None,
    everything: bool = False,
) -> Sample:
    """A conversation in OpenAI's form; the loss is on the assistant's turns.

    A turn of `weight` 0 is not in the loss. The text is split where a turn of the assistant begins
    and ends, and each piece is tokenized by itself: what precedes a turn is then, token by token,
    what a server would have answered.

    Raises:
        ValueError: a message that is not in the form, no turn to learn, or a chat template in
            which the conversation does not continue its prompt.
    """
    _check_messages(messages)
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template: give prompt and completion, or text")
    weights = [m.get("weight", 1) for m in messages]
    plain = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages]
    for i, message in enumerate(plain):
        message.setdefault("content", "")
        _check_calls(tokenizer, plain, i, tools)

    def render(count: int, generate: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    plain[:count], tools=tools, tokenize=False, add_generation_prompt=generate
                )
            )
        except Exception as exc:  # what a template raises is its own affair
            raise ValueError(f"the chat template refuses the messages: {exc}") from None

    if tools and _renders_alike(tokenizer, [(plain, tools), (plain, None)]):
        raise ValueError("tools: the model's chat template leaves them out")
    ids: list[int] = []
    labels: list[int] = []
    done = ""

    def add(text: str, learned: bool) -> None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids.extend(tokens)
        labels.extend(tokens if learned or everything else [IGNORED] * len(tokens))

    for i, message in enumerate(plain):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError("the model's chat template does not continue its prompt")
        turn = after[len(before) :].rstrip()
        add(before[len(done) :], False)
        add(turn, weights[i] != 0)
        done = before + turn
    return _checked(Sample(ids, labels))


def _checked(sample: Sample) -> Sample:
    """The first token predicts nothing before it: what is to be learned must lie after it."""
    assert isinstance(sample.labels, list)
    sample.labels[0] = IGNORED
    if all(label == IGNORED for label in sample.labels):
        raise ValueError("there is nothing to learn: no token is in the loss")
    return sample


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: a list of messages is expected")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: an object is expected")
        role = message.get("role")
        if role not in _ROLES:
            raise ValueError(f"{where}.role: {role!r} is not one of {', '.join(_ROLES)}")
        unknown = sorted(set(message) - _MESSAGE_KEYS)
        if unknown:
            raise ValueError(f"{where}.{unknown[0]}: not a field of a message")
        calls = message.get("tool_calls") or message.get("function_call")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"{where}.content: text is expected, not {content!r:.40}")
        if isinstance(content, str) and not content.strip() and not calls:
            raise ValueError(f"{where}.content: is empty")
        weight = message.get("weight")
        if weight is not None and (role != "assistant" or weight not in (0, 1)):
            raise ValueError(f"{where}.weight: 0 or 1, on messages of the assistant")
    turns = [m for m in messages if m["role"] == "assistant"]
    if not turns:
        raise ValueError("messages: no turn of the assistant, so there is nothing to learn")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError("messages: no message of the user, so the assistant answers nothing")
    if all(m.get("weight", 1) == 0 for m in turns):
        raise ValueError("messages: every turn of the assistant has weight 0")
    if messages[-1]["role"] != "assistant":
        raise ValueError("messages: the last one is not the assistant's, so it is never answered")


def _check_calls(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], i: int, tools: Any
) -> None:
    """Raises ValueError where the template leaves a message's calls out: they would be lost."""
    for name in ("tool_calls", "function_call"):
        if name not in messages[i]:
            continue
        without = [*messages[:i], {k: v for k, v in messages[i].items() if k != name}]
        if _renders_alike(tokenizer, [(messages[: i + 1], tools), (without, tools)]):
            raise ValueError(
                f"messages[{i}].{name}: the model's chat template leaves it out; write the call "
                "as text in content"
            )


def _renders_alike(
    tokenizer: PreTrainedTokenizerBase, variants: Sequence[tuple[list[dict[str, Any]], Any]]
) -> bool:
    """Does the template make one text of all these messages and tools?"""
    try:
        texts = {
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            for messages, tools in variants
        }
    except Exception as exc:  # what a template raises is its own affair
        raise ValueError(f"the chat template refuses the messages: {exc}") from None
    return len(texts) == 1


def packed(samples: Sequence[Sample], max_len: int, seed: int) -> list[list[Sample]]:
    """Samples put together into rows of at most `max_len` tokens, first fit in a random order."""
    order = list(samples)
    random.Random(seed).shuffle(order)
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in order:
        for i in range(max(0, len(rows) - 64), len(rows)):  # the last ones: enough, and quick
            if room[i] >= len(sample):
                rows[i].append(sample)
                room[i] -= len(sample)
                break
        else:
            rows.append([sample])
            room.append(max_len - len(sample))
    return rows
