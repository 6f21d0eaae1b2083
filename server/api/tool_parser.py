"""Tool calls in a growing text. What is no call of a known tool is given out as text.

A call is known as one once its name and the beginning of its arguments are there; from then on the
arguments are given out as they come, as they were written. Knows nothing of requests or answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Style:
    """How a model writes calls: objects with a name and arguments, each between two marks.

    Attributes:
        sign: what is in the templates of models that write so.
        begin, end: the marks; empty where the whole answer is calls, and begins with a brace.
        arguments: the key of the arguments; parsing takes both keys that are in use.
        skipped: what may stand before and between calls without marks.
    """

    name: str
    sign: str
    begin: str
    end: str
    arguments: Literal["arguments", "parameters"]
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of `name` begins; `index` counts the calls of one answer."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    index: int
    text: str


Piece = Text | CallStart | ArgumentsPiece

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class ToolCallParser:
    """One answer's text, piece by piece.

    Args:
        names: the tools that may be called.
        max_calls: calls after so many are dropped; None: all are given.
    """

    def __init__(self, style: Style, names: frozenset[str], max_calls: int | None = None) -> None:
        self._style = style
        self._names = names
        self._max_calls = max_calls
        self._pending = ""  # not given out yet
        self._opened = ""  # was before `_pending`, and is text if that is no call
        self._scanned = 0  # characters of `_pending` that `_object` has seen
        self._object = _ObjectEnd()
        self._is_behind_call = False
        self.num_calls = 0
        self._state: Literal["text", "call", "arguments", "tail", "after"]
        self._state = "text" if style.begin else "call"

    def push(self, text: str) -> list[Piece]:
        """Add text; what is certain by now."""
        self._pending += text
        return self._advance(final=False)

    def finish(self) -> list[Piece]:
        """What was held back, once no text follows."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        before = None
        while before != (before := (self._state, len(self._pending), len(self._opened))):
            match self._state:
                case "text":
                    pieces += self._text(final)
                case "call":
                    pieces += self._call(final)
                case "arguments":
                    pieces += self._arguments()
                case "tail":
                    self._tail()
                case "after":
                    self._after()
        return [piece for piece in pieces if isinstance(piece, CallStart) or piece.text]

    def _text(self, final: bool) -> Iterator[Piece]:
        """Text up to a mark; an end that may yet become one is held back."""
        begin = self._style.begin
        at = self._pending.find(begin) if begin else -1
        if at >= 0:
            text, self._pending = self._pending[:at], self._pending[at + len(begin) :]
            self._expect_call(begin)
        else:
            cut = len(self._pending) - (0 if final else _overlap(self._pending, begin))
            text, self._pending = self._pending[:cut], self._pending[cut:]
        # The line breaks behind calls are no content.
        text = text.lstrip() if self._is_behind_call else text
        self._is_behind_call = self._is_behind_call and not text
        yield Text(text)

    def _expect_call(self, opened: str) -> None:
        self._state, self._opened = "call", opened
        self._object, self._scanned = _ObjectEnd(), 0

    def _call(self, final: bool) -> Iterator[Piece]:
        """The head of a call, or a whole one whose keys come in another order."""
        if self._skip(final) and not final:
            return
        if not self._pending and not final:
            return
        head = _HEAD.match(self._pending)
        if head is not None and head[1] in self._names:
            self._pending = self._pending[head.end() :]
            self._state, self._object = "arguments", _ObjectEnd()
            if self._is_given:
                yield CallStart(self.num_calls, head[1])
            return
        if head is None and self._pending.startswith("{"):
            end = self._object.feed(self._pending[self._scanned :])
            if end is None and not final:
                self._scanned = len(self._pending)
                return
            end = len(self._pending) if end is None else self._scanned + end
            call = _whole_call(self._pending[:end], self._names)
            if call is not None:
                self._pending = self._pending[end:]
                if self._is_given:
                    yield CallStart(self.num_calls, call[0])
                    yield ArgumentsPiece(self.num_calls, call[1])
                self.num_calls += 1
                self._state = "after"
                return
        text, self._opened, self._state = self._opened, "", "text"
        # What closes a list of calls is no content.
        yield Text("" if self.num_calls and not self._style.begin else text)

    def _skip(self, final: bool) -> bool:
        """Set aside white space, and what may stand between calls without marks.

        True where a mark has only begun.
        """
        while True:
            body = self._pending.lstrip()
            if body and not final and any(m != body and m.startswith(body) for m in self._marks):
                return True
            mark = next((m for m in self._marks if body.startswith(m)), "")
            cut = len(self._pending) - len(body) + len(mark)
            self._opened += self._pending[:cut]
            self._pending = self._pending[cut:]
            if not mark:
                return False

    @property
    def _marks(self) -> Sequence[str]:
        return self._style.skipped

    @property
    def _is_given(self) -> bool:
        return self._max_calls is None or self.num_calls < self._max_calls

    def _arguments(self) -> Iterator[Piece]:
        end = self._object.feed(self._pending)
        piece = self._pending if end is None else self._pending[:end]
        self._pending = self._pending[len(piece) :]
        if self._is_given:
            yield ArgumentsPiece(self.num_calls, piece)
        if end is not None:
            self.num_calls += 1
            self._state, self._object = "tail", _ObjectEnd(depth=1)

    def _tail(self) -> None:
        """What a call says after its arguments: an id, its last brace."""
        end = self._object.feed(self._pending)
        self._pending = "" if end is None else self._pending[end:]
        if end is not None:
            self._state = "after"

    def _after(self) -> None:
        rest, end = self._pending.lstrip(), self._style.end
        self._is_behind_call = True
        if not end:
            self._expect_call("")
        elif rest.startswith(end) or (rest and not end.startswith(rest)):
            self._pending, self._state = rest.removeprefix(end), "text"


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces.

    Args:
        depth: of the braces that are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def feed(self, piece: str) -> int | None:
        """The place in `piece` behind the object's last brace, or None."""
        for i, char in enumerate(piece):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _whole_call(text: str, names: frozenset[str]) -> tuple[str, str] | None:
    """Name and arguments of a call, or None."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
