"""Text to tokens and back: the tokenizer's few uses, incremental text, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.errors import BadRequest


class Tokenizer:
    """The model's own tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        return cls(tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the model's own leading token if it has one."""
        return list(self._tokenizer(text)["input_ids"])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer starts.

        Raises:
            BadRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise BadRequest(
                "this model has no chat template: use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as exc:
            raise BadRequest(f"the chat template refuses: {exc}", param="messages") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not."""
        return str(self._tokenizer.decode([token_id]))

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """A fresh incremental detokenizer for one sequence."""
        return Detokenizer(self._tokenizer, stop)


class Detokenizer:
    """The text of one growing sequence, given out as soon as it is certain.

    Text that may yet turn out to begin a stop string is held back, as are bytes of an unfinished
    character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._decoded = ""  # all text so far
        self._given = 0  # characters of it that were given out
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token; returns new text, and sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        if not piece:
            return ""
        # A stop string may begin in text already decoded and held back, never before it.
        self._decoded += piece
        if not may_stop:
            return self._give(len(self._decoded))
        found = [i for s in self._stop if (i := self._decoded.find(s, self._given)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            return self._give(len(self._decoded))
        return self._give(len(self._decoded) - self._held())

    def finish(self) -> str:
        """The text that was held back, once no token follows."""
        if not self.stopped:
            whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
            if whole.startswith(self._decoded):
                self._decoded = whole
        return self._give(len(self._decoded))

    def _give(self, end: int) -> str:
        text = self._decoded[self._given : end]
        self._given = max(self._given, end)
        return text

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        pending = self._decoded[self._given :]
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(pending)), 0, -1):
            if any(s.startswith(pending[-n:]) for s in self._stop):
                return n
        return 0
