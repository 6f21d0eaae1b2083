"""Where each constrained sequence stands in its grammar, and which tokens may come next.

Knows matchers and masks; nothing of how a grammar was made (`server.engine.grammars`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from torch import Tensor

from peftcore.upload import to_device
from server.engine.sequence import Sequence
from server.errors import BadRequest, ServerError

if TYPE_CHECKING:
    from xgrammar import GrammarMatcher

#: CPU time that one sequence's mask may take in one step, in seconds. Ordinary ones take less than
#: a thousandth; a grammar that is far more ambiguous would hold up every request of the step.
MAX_MASK_SECONDS = 0.2
_TOO_AMBIGUOUS = "the grammar is too ambiguous to be followed in time"


class Guides:
    """The matchers of the sequences that have a grammar."""

    def __init__(self) -> None:
        self._matchers: dict[tuple[str, int], GrammarMatcher] = {}

    def forget(self, seq: Sequence) -> None:
        """Drop the sequence's matcher."""
        self._matchers.pop(seq.key, None)

    def mask(
        self, logits: Tensor, sequences: Seq[Sequence], rows: Seq[int]
    ) -> dict[int, ServerError]:
        """−inf for what the grammars forbid, in place, in one operation.

        Args:
            logits: `[sequences, vocab]`, float32.
            rows: those of `sequences` that have a grammar.

        Returns:
            The rows whose grammars take too long; they were not masked.
        """
        import xgrammar

        masks = xgrammar.allocate_token_bitmask(len(sequences), logits.shape[-1])
        failed: dict[int, ServerError] = {}
        for row in rows:
            start = time.thread_time()
            self._matcher(sequences[row]).fill_next_token_bitmask(masks, row)
            if time.thread_time() - start > MAX_MASK_SECONDS:
                failed[row] = BadRequest(_TOO_AMBIGUOUS)
        masked = [row for row in rows if row not in failed]
        if masked:
            device_masks = to_device(masks, logits.device)
            xgrammar.apply_token_bitmask_inplace(logits, device_masks, indices=masked)
        return failed

    def accept(
        self, sequences: Seq[Sequence], token_ids: Seq[int], rows: Seq[int]
    ) -> dict[int, ServerError]:
        """Move each row's matcher past its token; returns the rows whose grammar refuses it."""
        failed: dict[int, ServerError] = {}
        for row in rows:
            start = time.thread_time()
            if not self._matcher(sequences[row]).accept_token(token_ids[row]):
                failed[row] = BadRequest("the grammar allows no text: nothing may come next")
            elif time.thread_time() - start > MAX_MASK_SECONDS:
                failed[row] = BadRequest(_TOO_AMBIGUOUS)
        return failed

    def _matcher(self, seq: Sequence) -> GrammarMatcher:
        matcher = self._matchers.get(seq.key)
        if matcher is None:
            from xgrammar import GrammarMatcher

            assert seq.params.grammar is not None
            matcher = self._matchers[seq.key] = GrammarMatcher(seq.params.grammar)
        return matcher
