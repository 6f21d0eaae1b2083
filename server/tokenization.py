"""Text to tokens and back: the tokenizer's few uses, incremental text, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.errors import BadRequest

#: What decoding makes of bytes that are no whole character.
_UNFINISHED = "\ufffd"
#: Most tokens of a prompt's end that are looked through for whole characters.
_MAX_TAIL = 16


class Tokenizer:
    """The model's own tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        #: Tokens that are no part of a text.
        self.special = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        return cls(tokenizer)

    @property
    def fast(self) -> PreTrainedTokenizerFast:
        """The tokenizer itself."""
        return self._tokenizer

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def tool_template(self) -> str | None:
        """The chat template for requests with tools."""
        if self._tokenizer.chat_template is None:
            return None
        return str(self._tokenizer.get_chat_template(tools=[{}]))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text, with the model's own leading token if it has one."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_pair(
        self, text: str, pair: str | None = None
    ) -> tuple[list[int], list[int] | None, list[tuple[int, int]]]:
        """As `encode`, of one text or of two joined as the model's tokenizer joins them.

        Returns:
            token ids; token type ids, where there are two texts and the model tells them apart;
            each token's characters [start, end) in its own text, an empty span for a special one.
        """
        found = self._tokenizer(text, pair, return_offsets_mapping=True)
        types = found.get("token_type_ids") if pair is not None else None
        return list(found["input_ids"]), types, [tuple(span) for span in found["offset_mapping"]]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
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
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as exc:
            raise BadRequest(f"the chat template refuses: {exc}", param="messages") from None
        return self.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True))

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens written out."""
        return str(self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not."""
        return str(self._tokenizer.decode([token_id]))

    def detokenizer(
        self, prompt_token_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> Detokenizer:
        """A fresh incremental detokenizer for what follows a prompt."""
        return Detokenizer(self.decode, self.special, self._tail(prompt_token_ids), stop)

    def _tail(self, token_ids: Sequence[int]) -> list[int]:
        """The shortest end of a prompt that has text, all of it whole characters; or nothing."""
        for n in range(1, min(len(token_ids), _MAX_TAIL) + 1):
            text = self.decode(token_ids[-n:])
            if text and _UNFINISHED not in text:
                return list(token_ids[-n:])
        return []


class Detokenizer:
    """The text of one growing sequence, given out as soon as it is certain, and never taken back.

    Text that may yet turn out to begin a stop string is held back, as are bytes of an unfinished
    character. What a token says depends on those before it (decoders drop the first space, and join
    bytes), so new tokens are decoded behind some whose text is known, and that text is cut off.

    Args:
        decode: the text of token ids; special ones have none.
        special: token ids without text.
        tail: the end of the prompt.
        stop: strings that end the sequence.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        special: frozenset[int],
        tail: Sequence[int],
        stop: Sequence[str],
    ) -> None:
        self._decode = decode
        self._special = special
        self._stop = tuple(stop)
        # Invariant: the text of `_ids` begins with `_known`, which was taken; the first
        # `_num_context` of them end with a whole character and say no more than that.
        self._ids = list(tail)
        self._num_context = len(self._ids)
        self._known = decode(self._ids)
        self._decoded = ""  # all text so far
        self._given = 0  # characters of it that were given out
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token; returns new text, and sets `stopped` when a stop string is complete."""
        piece = "" if token_id in self._special else self._take(token_id)
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
            self._decoded += self._decode(self._ids)[len(self._known) :]
        return self._give(len(self._decoded))

    def _take(self, token_id: int) -> str:
        """The whole characters that a token adds."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.startswith(self._known):
            # Bytes that fit no character spoil those joined to them: decode the new ones alone.
            self._ids, self._num_context, self._known = self._ids[self._num_context :], 0, ""
            text = self._decode(self._ids)
        whole = text.rstrip(_UNFINISHED)
        piece = whole[len(self._known) :]
        if piece and whole == text:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._known = self._decode(self._ids)
        elif piece:
            self._known = whole
        return piece

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
