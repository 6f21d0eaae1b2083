"""The arena against a list of ranges: no overlap, nothing lost, nothing left behind."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from peftcore.arena import ALIGNMENT, AdapterArena, aligned

NUM_BLOCKS = 24
SIZES = st.integers(1, 9 * ALIGNMENT)


class ArenaMachine(RuleBasedStateMachine):
    """Every range is filled with a number of its own, over all of its aligned length."""

    ranges = Bundle("ranges")

    def __init__(self) -> None:
        super().__init__()
        self.arena = AdapterArena(NUM_BLOCKS * ALIGNMENT + 5, torch.float32)
        self.owned: dict[float, tuple[int, int]] = {}  # value → offset, aligned length
        self.next_value = 1.0

    def gaps(self) -> list[tuple[int, int]]:
        """(offset, length) of what nobody owns, in order."""
        found, end = [], 0
        for offset, length in [*sorted(self.owned.values()), (NUM_BLOCKS * ALIGNMENT, 0)]:
            if offset > end:
                found.append((end, offset - end))
            end = offset + length
        return found

    @rule(target=ranges, num_elements=SIZES)
    def allocate(self, num_elements: int) -> float | None:
        length = -(-num_elements // ALIGNMENT) * ALIGNMENT
        first_fit = next((at for at, room in self.gaps() if room >= length), None)
        offset = self.arena.allocate(num_elements)
        assert offset == first_fit
        if offset is None:
            return None
        assert offset % ALIGNMENT == 0
        assert not self.arena.data[offset : offset + length].any(), "not zeroed"
        value, self.next_value = self.next_value, self.next_value + 1
        self.owned[value] = (offset, length)
        self.arena.data[offset : offset + length] = value
        return value

    @rule(value=consumes(ranges))
    def free(self, value: float | None) -> None:
        if value is not None:
            offset, length = self.owned.pop(value)
            self.arena.free(offset)
            assert not self.arena.data[offset : offset + length].any()

    @rule(seed=st.integers(0, 99))
    def compact(self, seed: int) -> None:
        offsets = [offset for offset, _ in self.owned.values()]
        fixed = random.Random(seed).sample(offsets, len(offsets) * (seed % 4) // 6)
        moved = self.arena.compact(fixed)
        assert not set(moved) & set(fixed)
        assert all(new < old for old, new in moved.items())
        self.owned = {
            value: (moved.get(offset, offset), length)
            for value, (offset, length) in self.owned.items()
        }
        if not fixed:
            assert len(self.gaps()) <= 1
        # What is left of a gap lies before a range that had to stay, or at the end.
        ends = {*fixed, NUM_BLOCKS * ALIGNMENT}
        assert all(offset + length in ends for offset, length in self.gaps())

    @invariant()
    def holds_what_was_written(self) -> None:
        expected = torch.zeros(NUM_BLOCKS * ALIGNMENT)
        for value, (offset, length) in self.owned.items():
            assert not expected[offset : offset + length].any(), "ranges overlap"
            expected[offset : offset + length] = value
        assert torch.equal(self.arena.data, expected)
        used = sum(length for _, length in self.owned.values())
        assert self.arena.num_used == used
        assert self.arena.num_free == NUM_BLOCKS * ALIGNMENT - used
        self.arena.check_integrity()


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=False
)


def filled(*sizes: int) -> tuple[AdapterArena, list[int]]:
    arena = AdapterArena(8 * ALIGNMENT, torch.float32)
    offsets = []
    for i, size in enumerate(sizes):
        offset = arena.allocate(size * ALIGNMENT)
        assert offset is not None
        arena.data[offset : offset + size * ALIGNMENT] = i + 1
        offsets.append(offset)
    return arena, offsets


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    assert [aligned(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [
        0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT,
    ]  # fmt: skip
    arena = AdapterArena(3 * ALIGNMENT - 1, torch.float16)
    assert arena.num_elements == len(arena.data) == 2 * ALIGNMENT
    assert arena.data.dtype == torch.float16
    assert arena.allocate(2 * ALIGNMENT + 1) is None
    assert arena.allocate(2 * ALIGNMENT) == 0
    assert arena.allocate(1) is None


def test_an_empty_arena_holds_nothing() -> None:
    arena = AdapterArena(0, torch.float32)
    assert arena.allocate(1) is None
    assert arena.compact() == {}
    arena.check_integrity()


def test_a_gap_between_two_is_used_only_if_it_is_large_enough() -> None:
    arena, offsets = filled(2, 2, 2)
    arena.free(offsets[1])
    assert arena.num_free == 4 * ALIGNMENT
    assert arena.allocate(3 * ALIGNMENT) is None  # two gaps of two
    assert arena.compact() == {offsets[2]: 2 * ALIGNMENT}
    assert arena.allocate(3 * ALIGNMENT) == 4 * ALIGNMENT


def test_a_range_moves_into_a_gap_smaller_than_itself() -> None:
    """Where it comes from and where it goes overlap."""
    arena, offsets = filled(1, 5)
    arena.data[offsets[1] : offsets[1] + 5 * ALIGNMENT] = torch.arange(5 * ALIGNMENT) + 1.0
    arena.free(offsets[0])
    assert arena.compact() == {offsets[1]: 0}
    assert torch.equal(arena.data[: 5 * ALIGNMENT], torch.arange(5 * ALIGNMENT) + 1.0)
    assert not arena.data[5 * ALIGNMENT :].any()
    arena.check_integrity()


def test_what_is_not_owned_cannot_be_freed() -> None:
    arena, offsets = filled(2, 1)
    for wrong in (ALIGNMENT, 3 * ALIGNMENT, -1):
        with pytest.raises(KeyError):
            arena.free(wrong)
    arena.free(offsets[0])
    with pytest.raises(KeyError):
        arena.free(offsets[0])
    arena.check_integrity()


def test_an_empty_range_is_not_given_out() -> None:
    """It would share its offset with a range, and freeing one would free the other."""
    arena, _ = filled(2)
    with pytest.raises(AssertionError):
        arena.allocate(0)


def test_check_integrity_can_fail() -> None:
    arena, offsets = filled(2, 2)
    arena.data[4 * ALIGNMENT] = 1
    with pytest.raises(AssertionError, match="not zeroed"):
        arena.check_integrity()
    arena.data[4 * ALIGNMENT] = 0
    arena._used[offsets[0]] = 3 * ALIGNMENT
    with pytest.raises(AssertionError, match="overlap"):
        arena.check_integrity()
