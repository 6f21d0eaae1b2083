"""The scheduler, stepped as the engine does, over a cache that knows what each slot stands for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduler import Residency
from server.engine.sequence import AdapterUse, Sequence, Status
from tests.server.engine.scheduler_world import (
    StubAdapters,
    World,
    chunk_of,
    expected_output,
    sizes,
)

# -- one budget ----------------------------------------------------------------------------------


def test_a_prompt_over_the_budget_is_computed_in_chunks() -> None:
    world = World(budget=32)
    seq = world.add("long", 70, max_tokens=2)
    steps = [(sizes(world.step())["long"], seq.num_output_tokens) for _ in range(4)]
    assert steps == [(32, 0), (32, 0), (6, 1), (1, 2)]
    assert world.finished == ["long"]


def test_decodes_come_first_and_prompts_take_what_is_left() -> None:
    world = World(budget=8, max_num_seqs=4)
    for name in ("a", "b"):
        world.add(name, 4, max_tokens=10)
    world.step()
    world.add("long", 20, max_tokens=1)
    world.add("later", 3, max_tokens=1)
    assert sizes(world.step()) == {"a": 1, "b": 1, "long": 6}
    assert sizes(world.step()) == {"a": 1, "b": 1, "long": 6}
    assert sizes(world.step()) == {"a": 1, "b": 1, "long": 6}
    assert sizes(world.step()) == {"a": 1, "b": 1, "long": 2, "later": 3}


def test_prompts_beside_decodes_are_bounded() -> None:
    """Those under way and new ones together, and no more than while something decodes."""
    world = World(budget=16, max_prefill=5)
    world.add("first", 14, max_tokens=4)
    assert sizes(world.step()) == {"first": 14}
    world.add("long", 8, max_tokens=1)
    world.add("later", 30, max_tokens=1)
    assert sizes(world.step()) == {"first": 1, "long": 5}
    assert sizes(world.step()) == {"first": 1, "long": 3, "later": 2}
    assert sizes(world.step()) == {"first": 1, "later": 5}
    assert sizes(world.step()) == {"later": 16}


def test_a_prompt_under_way_goes_before_a_new_one_but_after_younger_decodes() -> None:
    world = World(budget=8, max_num_seqs=4)
    world.add("old", 14, max_tokens=9)
    world.step()
    world.add("young", 2, max_tokens=9)
    assert sizes(world.step()) == {"old": 6, "young": 2}
    world.add("new", 20)
    assert sizes(world.step()) == {"old": 1, "young": 1, "new": 6}


def test_a_full_house_of_decodes_leaves_room_for_each() -> None:
    world = World(budget=4, max_num_seqs=4)
    for i in range(4):
        world.add(f"s{i}", 1, max_tokens=5)
    for _ in range(4):
        world.step()
    assert sizes(world.step()) == dict.fromkeys(["s0", "s1", "s2", "s3"], 1)


def test_the_budget_must_hold_a_token_for_each_sequence() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        World(budget=7, max_num_seqs=8)


def test_no_more_sequences_run_than_allowed() -> None:
    world = World(max_num_seqs=3, num_blocks=200)
    for i in range(10):
        world.add(f"s{i}", 4, max_tokens=2 + i % 3)
    seen = []
    while world.live:
        world.step()
        seen.append(len(world.scheduler.running))
    assert max(seen) == 3
    assert sorted(world.finished) == sorted(f"s{i}" for i in range(10))
    world.assert_idle()


def test_first_come_first_served() -> None:
    world = World(max_num_seqs=3, budget=16)
    names = [f"s{i}" for i in range(12)]
    for i, name in enumerate(names):
        world.add(name, 1 + i * 7 % 23, max_tokens=1 + i % 4)
    world.run()
    assert world.started == names


def test_a_small_one_does_not_overtake_one_that_waits_for_blocks() -> None:
    world = World(num_blocks=8, block_size=4, budget=64)
    world.add("first", 20, max_tokens=4)
    world.step()
    world.add("large", 20)
    world.add("small", 1)
    while "first" not in world.finished:
        assert set(sizes(world.step())) == {"first"}
    world.run()
    assert world.started == ["first", "large", "small"]


# -- adapters ------------------------------------------------------------------------------------


def test_a_loading_adapter_holds_up_nobody_else() -> None:
    world = World(adapters=StubAdapters(load_steps=5))
    world.add("cold", 5, "x")
    world.add("mixture", 5, "x", "y")
    world.add("base", 5)
    assert sizes(world.step()) == {"base": 5}
    for i in range(4):
        world.add(f"base{i}", 5)
        assert f"base{i}" in sizes(world.step())
    assert {"cold", "mixture"} <= set(sizes(world.step()))
    world.run()


def test_a_ready_adapter_starts_at_once() -> None:
    world = World(adapters=StubAdapters(load_steps=3))
    world.add("one", 5, "x", max_tokens=1)
    world.run()
    world.add("two", 5, "x")
    assert set(sizes(world.step())) == {"two"}


def test_rows_with_one_adapter_lie_together() -> None:
    world = World(max_num_seqs=12, budget=60, adapters=StubAdapters(load_steps=1))
    for i in range(12):
        adapters = [(), ("x",), ("y",), ("x", "y"), (AdapterUse("x", 0.5),)][i % 5]
        world.add(f"s{i}", 4, *adapters, max_tokens=8)
    world.step()
    batch = world.step()
    batch = world.step()
    assert len(batch.chunks) == 12  # `execute` holds that the groups are contiguous


def test_sequences_whose_adapter_fails_are_given_back() -> None:
    """The first to wait learns it, and one that asks in the same step; the others go on."""
    world = World(adapters=StubAdapters(load_steps=2, broken=["bad"]))
    world.add("one", 5, "bad")
    world.add("mixture", 5, "good", "bad")
    world.add("fine", 5, "good")
    world.add("base", 5)
    world.run()
    assert world.failed == ["one", "mixture"]
    assert sorted(world.finished) == ["base", "fine"]
    world.assert_idle()


def test_an_error_of_the_adapters_loses_no_sequence() -> None:
    """Those that were looked at before it still wait, as those behind."""

    class Raising(StubAdapters):
        def acquire(self, seq: Sequence) -> Residency:
            if seq.key[0] == "unknown":
                raise KeyError(seq.key)
            return super().acquire(seq)

    world = World(adapters=Raising(load_steps=3, broken=["bad"]))
    for name, adapter in (("cold", "x"), ("broken", "bad"), ("unknown", "y"), ("behind", "z")):
        world.add(name, 5, adapter)
    for _ in range(5):
        with pytest.raises(KeyError):
            world.step()
        world.check_integrity()
    world.end(next(seq for seq in world.live if seq.key[0] == "unknown"))
    world.run()
    assert world.failed == ["broken"]
    assert sorted(world.finished) == ["behind", "cold"]
    world.assert_idle()


@pytest.mark.parametrize("max_overtaken", [0, 1, 5])
def test_a_stream_for_a_hot_adapter_does_not_starve_a_cold_one(max_overtaken: int) -> None:
    """Two or more hot sequences run at any time, so that their adapter is never unpinned."""
    adapters = StubAdapters(capacity=2, sizes={"big": 2}, load_steps=1)
    world = World(max_overtaken=max_overtaken, adapters=adapters)
    world.add("hot", 5, "hot")
    for _ in range(3):
        world.step()
    world.add("big", 5, "big")
    for i in range(100):
        world.add(f"hot{i}", 5, "hot", max_tokens=4)
        world.step()
        if "big" in world.started:
            break
    assert world.started.index("big") == 1 + max_overtaken
    world.run()
    world.assert_idle()


@pytest.mark.parametrize(("capacity", "max_overtaken"), [(3, 1), (4, 1), (4, 2)])
def test_later_arrivals_do_not_keep_memory_from_one_that_was_overtaken_enough(
    capacity: int, max_overtaken: int
) -> None:
    """Those behind it that have pinned their adapters go on: else each would wait for the other."""
    adapters = StubAdapters(capacity, sizes={"big": capacity}, load_steps=3)
    world = World(max_overtaken=max_overtaken, adapters=adapters)
    world.add("first", 5, "a", max_tokens=5)
    for _ in range(4):
        world.step()
    world.add("big", 5, "big")
    for i in range(8):
        world.add(f"cold{i}", 5, f"c{i}")
        world.step()
    world.run(100)
    assert world.started.index("big") == 1 + max_overtaken
    world.assert_idle()


def test_base_requests_pass_one_that_waits_for_adapter_memory() -> None:
    """They take none of it."""
    adapters = StubAdapters(capacity=1, load_steps=1)
    world = World(max_overtaken=1, adapters=adapters)
    world.add("x", 5, "x", max_tokens=50)
    for _ in range(2):
        world.step()
    world.add("y", 5, "y")
    for i in range(6):
        world.add(f"base{i}", 5, max_tokens=1)
        assert f"base{i}" in sizes(world.step())
    world.run()
    assert world.started[-1] == "y"


def test_a_smaller_adapter_may_start_before_a_large_one_that_does_not_fit() -> None:
    adapters = StubAdapters(capacity=3, sizes={"big": 3}, load_steps=1)
    world = World(adapters=adapters)
    world.add("x", 5, "x", max_tokens=20)
    world.step()
    world.add("big", 5, "big")
    world.add("y", 5, "y")
    world.run()
    assert world.started == ["x", "y", "big"]


# -- preemption ----------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_loses_no_token() -> None:
    world = World(num_blocks=8, block_size=4, budget=64)
    old = world.add("old", 10, "x", max_tokens=18)
    young = world.add("young", 10, "x", max_tokens=18)
    while not world.scheduler.num_preemptions:
        kept = list(young.token_ids)
        world.step()
    assert young.status is Status.WAITING
    assert young.token_ids == kept
    assert young.num_output_tokens > 0
    assert young.block_table == []
    assert young.pinned, "its adapter stays for it"
    assert old.status is Status.RUNNING
    world.run()
    assert world.finished == ["old", "young"]
    for seq in (old, young):
        assert seq.output_token_ids == expected_output(seq)
    world.assert_idle()


def test_a_preempted_one_comes_back_before_those_that_wait() -> None:
    world = World(num_blocks=8, block_size=4, budget=64, max_num_seqs=2)
    world.add("old", 10, max_tokens=18)
    young = world.add("young", 10, max_tokens=18)
    world.add("waiting", 1)
    while not world.scheduler.num_preemptions:
        world.step()
    assert [seq.key[0] for seq in world.scheduler.waiting] == ["young", "waiting"]
    batch = world.step()
    while not chunk_of(batch, young):
        assert "waiting" not in world.started
        batch = world.step()
    world.run()


def test_a_preempted_one_finds_its_own_blocks_again() -> None:
    world = World(num_blocks=9, block_size=4, budget=64)
    world.add("old", 9, max_tokens=12)
    young = world.add("young", 18, max_tokens=9)
    while not world.scheduler.num_preemptions:
        world.step()
    while young.status is Status.WAITING:
        batch = world.step()
    assert young.num_cached > 0
    chunk = chunk_of(batch, young)
    assert chunk is not None
    assert chunk.start == young.num_cached
    world.run()


def test_one_sequence_may_fill_the_pool() -> None:
    """To its last slot, and beside others that must make way."""
    world = World(num_blocks=6, block_size=4, budget=16)
    seqs = [world.add(f"s{i}", 7, max_tokens=17) for i in range(5)]
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert world.finished == [f"s{i}" for i in range(5)]
    for seq in seqs:
        assert len(seq.token_ids) == 24
        assert seq.output_token_ids == expected_output(seq)
    world.assert_idle()


# -- given keys and values of virtual positions --------------------------------------------------


@pytest.mark.parametrize("virtual", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_given_prefixes_are_written_where_the_cache_ends(virtual: int, prompt: int) -> None:
    """Once by the first, and by the next only what is not in full cached blocks."""
    world = World(adapters=StubAdapters(load_steps=1))
    for round_ in range(2):
        seq = world.add(f"s{round_}", prompt, "p", virtual=virtual, kv=True, max_tokens=1)
        batch = world.step()
        while not batch.chunks:
            batch = world.step()
        (chunk,) = batch.chunks
        # The prompts differ, so that only full blocks of virtual positions can be shared.
        cached = virtual // 4 * 4 if round_ else 0
        assert seq.num_cached == cached
        assert chunk.write_prefix_from == (cached if cached < virtual else None)
        assert chunk.start == virtual
        assert chunk.num_tokens == prompt
    world.assert_idle()


def test_a_cached_prompt_needs_no_prefix_written() -> None:
    world = World(adapters=StubAdapters(load_steps=1))
    prompt = list(range(10))
    world.add("one", prompt, "p", virtual=3, kv=True, max_tokens=1)
    world.run()
    world.add("two", prompt, "p", virtual=3, kv=True, max_tokens=1)
    (chunk,) = world.step().chunks
    assert chunk.write_prefix_from is None
    assert (chunk.start, chunk.end) == (12, 13)


def test_a_given_prefix_costs_no_budget_and_is_written_once() -> None:
    """It is longer than the budget; the prompt is chunked."""
    world = World(budget=8, adapters=StubAdapters(load_steps=1))
    world.add("s", 20, "p", virtual=21, kv=True, max_tokens=1)
    world.step()
    batches = [world.step() for _ in range(3)]
    chunks = [batch.chunks[0] for batch in batches]
    assert [(c.start, c.end) for c in chunks] == [(21, 29), (29, 37), (37, 41)]
    assert [c.write_prefix_from for c in chunks] == [0, None, None]


def test_computed_virtual_tokens_are_computed_like_a_prompt() -> None:
    world = World(budget=8, adapters=StubAdapters(load_steps=1))
    world.add("s", 3, "p", virtual=9, max_tokens=1)
    world.step()
    chunks = [world.step().chunks[0] for _ in range(2)]
    assert [(c.start, c.end) for c in chunks] == [(0, 8), (8, 12)]
    assert [c.write_prefix_from for c in chunks] == [None, None]


def test_a_preempted_prefix_is_written_again_where_it_was_lost() -> None:
    world = World(num_blocks=9, block_size=4, budget=64, adapters=StubAdapters(load_steps=1))
    world.add("old", 9, max_tokens=22)
    world.add("young", 5, "p", virtual=6, kv=True, max_tokens=17)
    writes = []
    while world.live:
        for chunk in world.step().chunks:
            if chunk.write_prefix_from is not None:
                writes.append((chunk.seq.key[0], chunk.write_prefix_from))
    assert world.scheduler.num_preemptions > 0
    assert writes[0] == ("young", 0)
    assert len(writes) > 1
    world.assert_idle()


# -- endings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["new", "loading", "full", "chunked", "decoding", "preempted"])
def test_a_sequence_can_end_in_any_state(state: str) -> None:
    adapters = StubAdapters(capacity=2, load_steps=3 if state == "loading" else 1)
    world = World(num_blocks=8, block_size=4, budget=16, adapters=adapters)
    world.add("other", 10, "x", max_tokens=18)
    for _ in range(3):
        world.step()
    prompt = 18 if state == "chunked" else 10
    seq = world.add("seq", prompt, *["y", "z"][: 2 if state == "full" else 1], max_tokens=18)
    if state != "new":
        world.step()
    if state in ("chunked", "decoding"):
        world.step()
    while state == "preempted" and not world.scheduler.num_preemptions:
        world.step()
    reached = {
        "new": not seq.pinned and seq.status is Status.WAITING,
        "loading": seq.pinned and seq.status is Status.WAITING,
        "full": not seq.pinned and seq.status is Status.WAITING,
        "chunked": 0 < seq.num_computed < seq.prompt_len,
        "decoding": seq.num_output_tokens > 0,
        "preempted": seq.status is Status.WAITING and seq.num_output_tokens > 0,
    }
    assert reached[state]
    world.end(seq)
    assert seq.status is Status.FINISHED
    assert seq.block_table == []
    assert not seq.pinned
    world.check_integrity()
    world.run()
    assert world.finished == ["other"]
    world.assert_idle()


# -- everything at once --------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(10, 24),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 12),
    capacity=st.integers(4, 7),
    load_steps=st.integers(1, 4),
    max_overtaken=st.integers(0, 3),
    max_prefill=st.none() | st.integers(1, 6),
)
def test_random_work_all_ends_and_every_read_is_right(
    seed: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    spare_budget: int,
    capacity: int,
    load_steps: int,
    max_overtaken: int,
    max_prefill: int | None,
) -> None:
    """Pools barely larger than one sequence; shared prompts; mixtures; prefixes; failures; aborts.
    `World.step` holds every read and every bound."""
    rng = random.Random(seed)
    names = ["a", "b", "c", "d", "bad"]
    adapters = StubAdapters(
        capacity, {name: rng.randint(1, 2) for name in names}, load_steps, broken=["bad"]
    )
    world = World(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs,
        budget=max_num_seqs + spare_budget, max_prefill=max_prefill, max_overtaken=max_overtaken,
        adapters=adapters,
    )  # fmt: skip
    virtual = {name: rng.randint(1, num_blocks * block_size // 3) for name in ("p", "q")}
    trunks = [[rng.randrange(2) for _ in range(60)] for _ in range(2)]
    everything: list[Sequence] = []
    num_aborted = 0
    for i in range(25):
        kind = rng.choice([(), ("a",), ("b",), ("c", "d"), ("a", "b"), ("bad",), ("p",), ("q",)])
        room = num_blocks * block_size - sum(virtual.get(name, 0) for name in kind)
        length = rng.randint(1, room - 1)
        max_tokens = rng.randint(1, min(12, room - length))
        prompt = rng.choice(trunks)[:length]
        prompt += [rng.randrange(2) for _ in range(length - len(prompt))]
        everything.append(
            world.add(
                f"s{i}", prompt, *kind, max_tokens=max_tokens,
                virtual=sum(virtual.get(name, 0) for name in kind), kv=kind == ("p",),
            )
        )  # fmt: skip
        for _ in range(rng.randint(0, 3)):
            world.step()
        if world.live and rng.random() < 0.1:
            world.end(rng.choice(world.live))
            world.check_integrity()
            num_aborted += 1
    world.run(5000)
    world.assert_idle()
    assert len(world.finished) + len(world.failed) + num_aborted == 25
    assert max(seq.num_overtaken for seq in everything) <= max_overtaken
    for seq in everything:
        if seq.key[0] in world.finished:
            assert seq.output_token_ids == expected_output(seq)
