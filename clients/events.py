"""Server-sent events of completions and chat: bytes in, text out. Reads no connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from clients.errors import ConnectionLost, error_of
from clients.results import Reply


class EventReader:
    """Puts one answer together from its stream's bytes.

    Attributes:
        text: of the first choice, so far.
        finish_reason: why it ended, once it has.
    """

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._rest = b""
        self._last: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._done = False

    def feed(self, data: bytes) -> Iterator[str]:
        """The pieces of text in what arrived; bytes may be cut anywhere.

        Raises ServerFailed: the server broke the stream off.
        """
        # By hand, since a line ends at no other character here than str.splitlines would have it.
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r"))

    def _line(self, line: bytes) -> Iterator[str]:
        if self._done or not line.startswith(b"data:"):
            return
        payload = line.removeprefix(b"data:").strip()
        if payload == b"[DONE]":
            self._done = True
            return
        chunk = json.loads(payload)
        if "error" in chunk:
            raise error_of(500, chunk)
        self._last = chunk
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            if choice["index"] != 0:
                continue
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if piece:
                self.text += piece
                yield piece

    def close(self) -> None:
        """The bytes have ended. Raises ConnectionLost: too early."""
        if not self._done:
            raise ConnectionLost("the stream ended early")

    def reply(self) -> Reply:
        """The answer so far; its counts are 0 until the stream has ended."""
        return Reply.of(self.text, self.finish_reason, self._usage, self._last)
