"""What the next step computes. Imports no torch; knows nothing of weights or of text.

One token budget a step. Sequences that decode come first, one token each; then chunks of prompts
that are under way; then new sequences, in the order in which they came. Beside decodes
`max_prefill_tokens` bounds the prompts. A new sequence waits for its adapter, for cache blocks and
for a place; while it waits for its *adapter*, those behind it go ahead. Where the adapter waits for
memory, at most `max_overtaken` of those behind may pin adapters before it can, so that a stream of
requests for other adapters cannot starve it; those that have pinned theirs still go ahead, since
only by ending do they give memory back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.engine.block_manager import BlockManager
from server.engine.sequence import Sequence, Status

Residency = Literal["ready", "loading", "full", "failed"]


#: Waiting sequences that one step looks past.
_MAX_PASSED = 256


class Adapters(Protocol):
    """What the scheduler asks of the adapter cache."""

    def acquire(self, seq: Sequence) -> Residency:
        """Pin the sequence's adapters, and load those that are not resident.

        "ready": pinned and resident. "loading": pinned, ask again. "full": no room now, nothing is
        pinned. "failed": cannot be loaded, nothing is pinned.
        """

    def release(self, seq: Sequence) -> None:
        """Drop the sequence's pins, if it has any."""


@dataclass(frozen=True)
class Chunk:
    """Positions [start, start + num_tokens) of one sequence, computed in this step.

    `write_prefix_from`: positions from here to the end of the virtual ones get the adapter's given
    keys and values before the step, or None.
    """

    seq: Sequence
    start: int
    num_tokens: int
    write_prefix_from: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def completes(self) -> bool:
        """Does this chunk reach the sequence's last token?"""
        return self.end == len(self.seq.token_ids)

    @property
    def samples(self) -> bool:
        """Does it, so that the next token is sampled?"""
        return self.completes and self.seq.pooling is None

    @property
    def num_outputs(self) -> int:
        """Of how many rows at the chunk's end the logits are needed."""
        scored = self.seq.next_scored
        if scored is None:
            return int(self.samples)
        return max(0, self.end - max(self.start, scored))


@dataclass
class Batch:
    """One step: chunks sorted by adapter, so that rows with one adapter lie together."""

    chunks: list[Chunk] = field(default_factory=list)
    #: Sequences whose adapters turned out not to be loadable.
    failed: list[Sequence] = field(default_factory=list)


class Scheduler:
    """The waiting and the running sequences.

    Args:
        max_prefill_tokens: most prompt tokens in a step that decodes too; None: what the budget
            leaves.
        whole: a sequence is computed in one step, and what is in its blocks serves no other one:
            the model is an encoder, whose every position sees all of them.
    """

    def __init__(
        self,
        blocks: BlockManager,
        adapters: Adapters,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens: int | None = None,
        max_overtaken: int = 32,
        whole: bool = False,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.blocks = blocks
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.max_overtaken = max_overtaken
        self.whole = whole
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> Batch:
        """Choose the next step's chunks and give their sequences blocks."""
        batch = Batch()
        budget = self.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(batch, budget)
        if self.num_preemptions == num_preemptions:
            self._admit(batch, budget)
        batch.chunks.sort(key=lambda chunk: chunk.seq.cache_seed)
        return batch

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        """Decodes, then prompt chunks under way. Returns what is left of the budget."""
        num_left = {id(seq): len(seq.token_ids) - seq.num_computed for seq in self.running}
        decodes = [seq for seq in self.running if num_left[id(seq)] == 1]
        prompts = [seq for seq in self.running if num_left[id(seq)] > 1]
        budget = self._continue(decodes, batch, budget)
        if batch.chunks and self.max_prefill_tokens is not None:
            budget = min(budget, self.max_prefill_tokens)
        return self._continue(prompts, batch, budget)

    def _continue(self, sequences: Seq[Sequence], batch: Batch, budget: int) -> int:
        """Chunks of running sequences. Returns what is left of the budget."""
        for seq in sequences:
            if seq.status is not Status.RUNNING:
                continue  # preempted for one before it
            num_tokens = min(len(seq.token_ids) - seq.num_computed, budget)
            if num_tokens == 0:
                break
            if not self._make_room(seq, seq.num_computed + num_tokens, batch):
                continue
            batch.chunks.append(Chunk(seq, seq.num_computed, num_tokens))
            budget -= num_tokens
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int, batch: Batch) -> bool:
        """Grow `seq`, preempting the youngest sequences; False if it was itself preempted."""
        while not self.blocks.grow(seq, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            batch.chunks[:] = [chunk for chunk in batch.chunks if chunk.seq is not victim]
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue, to be computed again; its adapters stay pinned."""
        self.running.remove(seq)
        self.blocks.release(seq)
        seq.reset()
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self, batch: Batch, budget: int) -> None:
        """Start waiting sequences while budget, places and blocks last.

        Whatever happens, a sequence is in one queue; one that failed stays until it is finished.
        """
        num_passed = 0
        starved: Sequence | None = None
        num_places = self.max_num_seqs - len(self.running)
        for seq in list(self.waiting):
            if budget == 0 or num_places == 0 or num_passed == _MAX_PASSED:
                break
            pins_more = bool(seq.adapters) and not seq.pinned
            if pins_more and starved is not None and starved.num_overtaken >= self.max_overtaken:
                num_passed += 1
                continue
            residency = self.adapters.acquire(seq)
            if residency == "failed":
                batch.failed.append(seq)
                continue
            if starved is None and residency == "full":
                starved = seq
            elif starved is not None and residency != "full" and pins_more:
                starved.num_overtaken += 1
            if residency != "ready":
                num_passed += 1
                continue
            num_tokens = self._start(seq, budget)
            if num_tokens is None:
                break
            write_from = seq.num_cached if seq.virtual_kv else None
            if write_from is not None and write_from >= seq.num_virtual_tokens:
                write_from = None
            batch.chunks.append(Chunk(seq, seq.num_computed, num_tokens, write_from))
            budget -= num_tokens
            num_places -= 1

    def _start(self, seq: Sequence, budget: int) -> int | None:
        """Match the cached prefix and take blocks for a first chunk; None if there are too few, or
        if the budget does not hold a sequence that must not be cut."""
        if not self.whole and seq.may_skip_cached:
            self.blocks.match(seq)
        start = max(seq.num_cached, seq.num_virtual_tokens if seq.virtual_kv else 0)
        num_tokens = min(len(seq.token_ids) - start, budget)
        is_cut = self.whole and start + num_tokens < len(seq.token_ids)
        if is_cut or not self.blocks.grow(seq, start + num_tokens):
            self.blocks.release(seq)
            seq.reset()
            return None
        seq.num_computed = start
        seq.status = Status.RUNNING
        self.waiting.remove(seq)
        self.running.append(seq)
        return num_tokens

    def computed(self, batch: Batch) -> None:
        """The step is done: what it computed is in the cache."""
        for chunk in batch.chunks:
            already = chunk.start if chunk.write_prefix_from is None else chunk.write_prefix_from
            chunk.seq.num_computed = chunk.end
            if not self.whole:
                self.blocks.commit(chunk.seq, already)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back its blocks and pins."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.blocks.release(seq)
        self.adapters.release(seq)
        seq.status = Status.FINISHED
