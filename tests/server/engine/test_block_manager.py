"""Blocks: sharing, reuse, counts, against a model that keeps whole prefixes instead of hashes."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.block_manager import BlockManager
from server.engine.sequence import AdapterUse, SamplingParams, Sequence

SIZE = 4


def sequence(
    tokens: list[int], *adapters: AdapterUse, virtual: int = 0, kv: bool = False
) -> Sequence:
    return Sequence(
        ("s", 0), tokens, SamplingParams(), adapters=adapters,
        num_virtual_tokens=virtual, virtual_kv=kv,
    )  # fmt: skip


def compute(blocks: BlockManager, seq: Sequence, end: int | None = None) -> None:
    """What a step does: blocks for positions below `end`, and what was computed made findable."""
    end = len(seq.token_ids) if end is None else end
    already = max(seq.num_computed, seq.num_cached)
    assert blocks.grow(seq, end)
    seq.num_computed = end
    blocks.commit(seq, already)


def num_matched(
    blocks: BlockManager, tokens: list[int], *adapters: AdapterUse, virtual: int = 0
) -> int:
    seq = sequence(tokens, *adapters, virtual=virtual)
    cached = blocks.match(seq)
    blocks.release(seq)
    return cached


A, B = AdapterUse("a" * 64), AdapterUse("b" * 64)
PROMPT = list(range(10, 23))  # three full blocks and one token


@pytest.mark.parametrize(
    ("owner", "other"),
    [
        ((), (A,)),
        ((A,), ()),
        ((A,), (B,)),
        ((A,), (AdapterUse(A.digest, 0.5),)),
        ((A,), (A, B)),
        ((A, B), (B,)),
        ((A, B), (B, A)),
        ((A, AdapterUse(B.digest, 0.5)), (AdapterUse(A.digest, 0.5), B)),
        ((A, AdapterUse(B.digest, 0.5)), (A, AdapterUse(B.digest, -0.5))),
        ((AdapterUse(A.digest, 0.1),), (AdapterUse(A.digest, 0.1 + 2e-17),)),
    ],
)
def test_a_prefix_is_shared_with_the_same_adapters_only(owner, other) -> None:
    blocks = BlockManager(16, SIZE)
    first = sequence(PROMPT, *owner)
    compute(blocks, first)
    assert num_matched(blocks, PROMPT, *owner) == 12
    assert num_matched(blocks, PROMPT, *other) == 0
    blocks.release(first)
    assert num_matched(blocks, PROMPT, *owner) == 12
    assert num_matched(blocks, PROMPT, *other) == 0


def test_placeholders_of_virtual_tokens_are_no_real_zeros() -> None:
    """Virtual positions hold zeros; so may the base's prompt, or the adapter's own prompt."""
    blocks = BlockManager(16, SIZE)
    soft = sequence([5, 6, 7], A, virtual=6)
    compute(blocks, soft)
    assert num_matched(blocks, [0] * 6 + [5, 6, 7]) == 0
    assert num_matched(blocks, [5, 6, 9], A, virtual=6) == 8
    assert num_matched(blocks, [9, 9, 9], A, virtual=6) == 4  # virtual tokens alone


def test_a_match_is_a_chain_from_the_start() -> None:
    """A block is found only behind the blocks before it, and only under the same tokens."""
    blocks = BlockManager(16, SIZE)
    compute(blocks, sequence(PROMPT))
    assert num_matched(blocks, PROMPT[:8] + [99] * 8) == 8
    assert num_matched(blocks, [99, *PROMPT[1:]]) == 0
    assert num_matched(blocks, PROMPT[4:]) == 0
    assert num_matched(blocks, PROMPT[:4] + PROMPT[8:]) == 4


@pytest.mark.parametrize("length", range(1, 14))
def test_a_match_leaves_a_token_to_compute(length: int) -> None:
    blocks = BlockManager(16, SIZE)
    compute(blocks, sequence(PROMPT))
    expected = (length - 1) // SIZE * SIZE
    assert num_matched(blocks, PROMPT[:length]) == expected < length


def test_what_is_not_computed_is_not_found() -> None:
    """Chunked: a block counts once its last position is computed, not once it is allocated."""
    blocks = BlockManager(16, SIZE)
    seq = sequence(PROMPT)
    assert blocks.grow(seq, 13)
    for end, found in ((3, 0), (4, 4), (7, 4), (11, 8), (12, 12)):
        already, seq.num_computed = seq.num_computed, end
        blocks.commit(seq, already)
        assert num_matched(blocks, PROMPT) == found


def test_generated_tokens_are_found_too() -> None:
    blocks = BlockManager(16, SIZE)
    seq = sequence([1, 2, 3])
    compute(blocks, seq)
    for token in (4, 5, 6, 7, 8):
        seq.token_ids.append(token)
        compute(blocks, seq)
    assert num_matched(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_grow_gives_all_or_nothing() -> None:
    blocks = BlockManager(4, SIZE)
    first, second = sequence(PROMPT[:5]), sequence([50] * 20)
    assert blocks.grow(first, 5)
    assert len(first.block_table) == 2
    assert blocks.grow(first, 8)
    assert len(first.block_table) == 2, "the last block still has room"
    assert not blocks.grow(second, 9)
    assert second.block_table == []
    assert blocks.num_free == 2
    assert blocks.grow(second, 8)
    assert not blocks.grow(second, 9)
    assert len(second.block_table) == 2
    assert blocks.num_free == 0
    blocks.check_integrity([first, second])
    assert blocks.grow(second, 3), "fewer positions than it has blocks for"


def test_recycled_blocks_forget_what_they_held() -> None:
    """Least recently freed first, and of one sequence the end before the start."""
    blocks = BlockManager(6, SIZE)
    old, new = sequence([1] * 12), sequence([2] * 12)
    for seq in (old, new):
        compute(blocks, seq)
    order = [*reversed(old.block_table), *reversed(new.block_table)]
    blocks.release(old)
    blocks.release(new)
    compute(blocks, three := sequence([3] * 4))
    compute(blocks, four := sequence([4] * 4))
    assert three.block_table + four.block_table == order[:2]
    assert [num_matched(blocks, [n] * 13) for n in (1, 2)] == [4, 12]
    compute(blocks, five := sequence([5] * 4))
    compute(blocks, six := sequence([6] * 12))
    assert [num_matched(blocks, [n] * 13) for n in (1, 2)] == [0, 0]
    blocks.check_integrity([three, four, five, six])


def test_a_match_protects_from_reuse_and_counts_as_use() -> None:
    blocks = BlockManager(4, SIZE)
    one, two = sequence([1] * 8), sequence([2] * 8)
    for seq in (one, two):
        compute(blocks, seq)
        blocks.release(seq)
    again = sequence([1] * 9)
    assert blocks.match(again) == 8
    assert not blocks.grow(sequence([3] * 12), 12), "its blocks are not free"
    blocks.release(again)  # now the more recently used
    compute(blocks, three := sequence([3] * 8))
    assert num_matched(blocks, [1] * 9) == 8
    assert num_matched(blocks, [2] * 9) == 0
    blocks.check_integrity([three])


def test_two_that_compute_the_same_keep_their_own_blocks() -> None:
    blocks = BlockManager(8, SIZE)
    one, two = sequence(PROMPT), sequence(PROMPT)
    compute(blocks, one)
    compute(blocks, two)  # was admitted before the first was done
    assert not set(one.block_table) & set(two.block_table)
    blocks.release(one)
    assert num_matched(blocks, PROMPT) == 12
    blocks.check_integrity([two])
    blocks.release(two)
    blocks.check_integrity()
    assert blocks.num_free == 8


@pytest.mark.parametrize("harm", ["leak", "free twice", "lost hash"])
def test_check_integrity_finds(harm: str) -> None:
    blocks = BlockManager(8, SIZE)
    seq = sequence(PROMPT)
    compute(blocks, seq)
    blocks.check_integrity([seq])
    live = [seq]
    if harm == "leak":
        live = []
    elif harm == "free twice":
        blocks._free[seq.block_table[0]] = None
    else:
        blocks._hash_of.popitem()
    with pytest.raises(AssertionError):
        blocks.check_integrity(live)


class Churn(RuleBasedStateMachine):
    """Arrivals, growth, generation, release; the model names blocks by adapter and whole prefix."""

    NUM = 10

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM, SIZE)
        self.live: list[Sequence] = []
        self.free = list(range(self.NUM))
        self.held: dict[int, tuple] = {}
        self.names = count()

    def prefix(self, seq: Sequence, index: int) -> tuple:
        return (seq.adapters, seq.num_virtual_tokens, *seq.token_ids[: (index + 1) * SIZE])

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        adapters=st.sampled_from([(), (A,), (B,), (A, B), (B, A)]),
    )
    def arrive(self, tokens: list[int], adapters: tuple[AdapterUse, ...]) -> None:
        # A digest determines its number of virtual tokens.
        seq = sequence(tokens, *adapters, virtual=6 if adapters == (B,) else 0)
        expected: list[int] = []
        by_prefix = {prefix: block for block, prefix in self.held.items()}
        for i in range((len(seq.token_ids) - 1) // SIZE):
            block = by_prefix.get(self.prefix(seq, i))
            if block is None:
                break
            expected.append(block)
        assert self.blocks.match(seq) == seq.num_cached == len(expected) * SIZE
        assert seq.block_table == expected
        self.free = [b for b in self.free if b not in expected]
        seq.num_computed = seq.num_cached
        self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        if seq.num_computed == len(seq.token_ids):
            seq.token_ids.append(data.draw(st.integers(0, 1)))
        end = data.draw(st.integers(seq.num_computed + 1, len(seq.token_ids)))
        before = list(seq.block_table)
        need = -(-end // SIZE) - len(before)
        if need > len(self.free):
            assert not self.blocks.grow(seq, end)
            assert seq.block_table == before
            return
        taken, self.free = self.free[: max(0, need)], self.free[max(0, need) :]
        assert self.blocks.grow(seq, end)
        assert seq.block_table == before + taken
        for block in taken:
            self.held.pop(block, None)
        already, seq.num_computed = seq.num_computed, end
        self.blocks.commit(seq, already)
        for i in range(already // SIZE, end // SIZE):
            prefix, block = self.prefix(seq, i), seq.block_table[i]
            if block not in self.held and prefix not in self.held.values():
                self.held[block] = prefix

    @precondition(lambda self: self.live)
    @rule(data=st.data(), again=st.booleans())
    def leave(self, data: st.DataObject, again: bool) -> None:
        """Finish, or be preempted and come back at once."""
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        others = Counter(b for s in self.live for b in s.block_table)
        self.free += [b for b in reversed(seq.block_table) if not others[b]]
        self.blocks.release(seq)
        if again:
            seq.reset()
            assert seq.block_table == []
            assert self.blocks.match(seq) % SIZE == 0
            self.free = [b for b in self.free if b not in seq.block_table]
            seq.num_computed = seq.num_cached
            for i, block in enumerate(seq.block_table):
                assert self.held[block] == self.prefix(seq, i)
            self.live.append(seq)

    @invariant()
    def sound(self) -> None:
        self.blocks.check_integrity(self.live)
        assert self.blocks.num_free == len(self.free)


TestChurn = Churn.TestCase
TestChurn.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True
)
