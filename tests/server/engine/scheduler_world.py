"""What the scheduler's tests step it over: a cache that knows what each slot stands for.

No model runs: a slot holds the adapters and the tokens up to its position, so that any read of a
wrong, a stale or a wrongly shared slot shows; the next token depends on all of the sequence.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping

from server.engine.block_manager import BlockManager
from server.engine.scheduler import Batch, Chunk, Residency, Scheduler
from server.engine.sequence import AdapterUse, SamplingParams, Sequence, Status


class StubAdapters:
    """The boundary: adapters with sizes in a memory of `capacity`; a load takes `load_steps`."""

    def __init__(
        self,
        capacity: int = 1000,
        sizes: Mapping[str, int] | None = None,
        load_steps: int = 2,
        broken: Collection[str] = (),
    ) -> None:
        self.capacity = capacity
        self.sizes = dict(sizes or {})
        self.load_steps = load_steps
        self.broken = frozenset(broken)
        self.steps_left: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self.pins: Counter[str] = Counter()

    def size(self, digest: str) -> int:
        return self.sizes.get(digest, 1)

    def tick(self) -> None:
        for digest, left in list(self.steps_left.items()):
            if left == 1 and digest in self.broken:
                del self.steps_left[digest]
            else:
                self.steps_left[digest] = max(0, left - 1)

    def acquire(self, seq: Sequence) -> Residency:
        digests = {use.digest for use in seq.adapters}
        if not seq.pinned:
            missing = [d for d in digests if d not in self.steps_left]
            need = sum(map(self.size, missing))
            evictable = [
                d for d, left in self.steps_left.items()
                if not left and not self.pins[d] and d not in digests
            ]  # fmt: skip
            if need > self.free + sum(map(self.size, evictable)):
                return "full"
            while need > self.free:
                del self.steps_left[evictable.pop(0)]
            self.steps_left.update(dict.fromkeys(missing, self.load_steps))
            self.pins.update(digests)
            seq.pinned = True
        if any(d not in self.steps_left for d in digests):
            self.release(seq)
            return "failed"
        for digest in digests:
            self.steps_left.move_to_end(digest)
        return "loading" if any(self.steps_left[d] for d in digests) else "ready"

    @property
    def free(self) -> int:
        return self.capacity - sum(map(self.size, self.steps_left))

    def release(self, seq: Sequence) -> None:
        if seq.pinned:
            self.pins.subtract({use.digest for use in seq.adapters})
            seq.pinned = False

    def check_integrity(self, live: Collection[Sequence]) -> None:
        pins = Counter(d for s in live if s.pinned for d in {use.digest for use in s.adapters})
        assert +self.pins == pins
        assert self.free >= 0


def next_token(seed: bytes, tokens: list[int]) -> int:
    return zlib.crc32(seed + bytes(tokens)) % 3


def expected_output(seq: Sequence) -> list[int]:
    tokens = seq.token_ids[: seq.prompt_len]
    for _ in range(seq.params.max_tokens):
        tokens.append(next_token(seq.cache_seed, tokens))
    return tokens[seq.prompt_len :]


class World:
    """A scheduler with its blocks, adapters and the meaning of every slot."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 32,
        max_prefill: int | None = None,
        max_overtaken: int = 32,
        adapters: StubAdapters | None = None,
    ) -> None:
        self.adapters = adapters or StubAdapters()
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks, self.adapters, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget, max_prefill_tokens=max_prefill,
            max_overtaken=max_overtaken,
        )  # fmt: skip
        self.slots: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.live: list[Sequence] = []
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.started: list[str] = []  # in the order of their first chunks

    def add(
        self,
        name: str,
        prompt: int | list[int] = 5,
        *adapters: str | AdapterUse,
        max_tokens: int = 3,
        virtual: int = 0,
        kv: bool = False,
    ) -> Sequence:
        uses = tuple(AdapterUse(a) if isinstance(a, str) else a for a in adapters)
        if isinstance(prompt, int):
            rng = random.Random(name)
            prompt = [rng.randrange(256) for _ in range(prompt)]
        seq = Sequence(
            (name, 0), prompt, SamplingParams(max_tokens=max_tokens), adapters=uses,
            num_virtual_tokens=virtual, virtual_kv=kv, max_len=10_000,
        )  # fmt: skip
        self.live.append(seq)
        self.scheduler.add(seq)
        return seq

    def step(self) -> Batch:
        self.adapters.tick()
        before, num_preemptions = list(self.scheduler.running), self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        if self.scheduler.num_preemptions > num_preemptions:
            assert all(chunk.seq in before for chunk in batch.chunks), "one in, another out"
            assert set(map(id, self.scheduler.running)) < set(map(id, before))
        for seq in batch.failed:
            self.failed.append(seq.key[0])
            self.end(seq)
        self.execute(batch)
        sampled = [chunk.seq for chunk in batch.chunks if chunk.samples]
        self.scheduler.computed(batch)
        for seq in sampled:
            seq.token_ids.append(next_token(seq.cache_seed, seq.token_ids))
            if seq.num_output_tokens == seq.params.max_tokens:
                self.finished.append(seq.key[0])
                self.end(seq)
        self.check_integrity()
        return batch

    def execute(self, batch: Batch) -> None:
        """Write and read slots as the model runner does, and hold the batch against its bounds."""
        assert sum(c.num_tokens for c in batch.chunks) <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        assert len({id(c.seq) for c in batch.chunks}) == len(batch.chunks)
        seeds = [c.seq.cache_seed for c in batch.chunks]
        assert len(set(seeds)) == sum(a != b for a, b in zip([None, *seeds], seeds, strict=False))
        written: set[int] = set()
        for chunk in batch.chunks:
            seq = chunk.seq
            assert seq.status is Status.RUNNING
            assert seq.pinned
            assert chunk.num_tokens > 0
            assert not any(self.adapters.steps_left[use.digest] for use in seq.adapters)
            if seq.key[0] not in self.started:
                self.started.append(seq.key[0])
            positions = list(range(chunk.start, chunk.end))
            if chunk.write_prefix_from is not None:
                positions += range(chunk.write_prefix_from, seq.num_virtual_tokens)
            for position in positions:
                slot = self.slot(seq, position)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = self.meaning(seq, position)
        for seq in self.scheduler.running:  # also those that have no chunk in this step
            end = next((c.end for c in batch.chunks if c.seq is seq), seq.num_computed)
            for position in range(end):
                assert self.slots[self.slot(seq, position)] == self.meaning(seq, position)

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return seq.block_table[position // size] * size + position % size

    @staticmethod
    def meaning(seq: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
        return seq.cache_seed, tuple(seq.token_ids[: position + 1])

    def end(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.live.remove(seq)

    def run(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.live:
                return
            self.step()
        raise AssertionError(f"not finished: {[(s.key, s.status) for s in self.live]}")

    def check_integrity(self) -> None:
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert {id(s) for s in queued} == {id(s) for s in self.live}
        assert len(queued) == len(self.live)
        self.blocks.check_integrity(self.live)
        self.adapters.check_integrity(self.live)

    def assert_idle(self) -> None:
        assert not self.live
        assert self.blocks.num_free == self.blocks.num_blocks
        assert not +self.adapters.pins


def chunk_of(batch: Batch, seq: Sequence) -> Chunk | None:
    return next((chunk for chunk in batch.chunks if chunk.seq is seq), None)


def sizes(batch: Batch) -> dict[str, int]:
    return {chunk.seq.key[0]: chunk.num_tokens for chunk in batch.chunks}
