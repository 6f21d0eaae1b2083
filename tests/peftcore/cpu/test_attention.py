"""Paged attention against eager attention in float64; a position alone and among others."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sinks_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.peftcore.cpu.cases import by_threads, generator, threads
from tests.peftcore.cpu.paged import Piece, Scores, Shape, World, eager, rotated

#: Heads and sizes: of a small Llama, one head, more queries of a head than a register tile, sizes
#: that are no whole vector, values of another size (DeepSeek), partial rotation (GLM, Phi).
SHAPES = {
    "gqa": Shape(heads=6, kv_heads=2, dim=32, v_dim=32, rotary_dim=32),
    "one head": Shape(heads=1, kv_heads=1, dim=4, v_dim=4),
    "multi-query": Shape(heads=7, kv_heads=1, dim=16, v_dim=16, rotary_dim=16),
    "odd sizes": Shape(heads=4, kv_heads=4, dim=10, v_dim=7, rotary_dim=6),
    "wide values": Shape(heads=4, kv_heads=2, dim=24, v_dim=80, rotary_dim=8),
    "narrow values": Shape(heads=2, kv_heads=2, dim=72, v_dim=33),
}
BLOCK_SIZES = [16, 32, 4, 3]
CACHES = [torch.float32, torch.float16]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.5, -6.0])
#: What models ask for: nothing, Mistral, Gemma 2, GPT-OSS, all of it.
SCORES = {
    "plain": Scores(),
    "one position": Scores(window=1),
    "window": Scores(window=20),
    "long window": Scores(window=70),
    "softcap": Scores(softcap=2.0),
    "sinks": Scores(sinks=SINKS),
    "all": Scores(window=33, softcap=3.0, sinks=SINKS),
}


def scores_for(shape: Shape, scores: Scores) -> Scores:
    if scores.sinks is None:
        return scores
    sinks = SINKS.repeat(2)[: shape.heads].contiguous()
    return Scores(scores.scale, scores.window, scores.softcap, sinks)


def assert_exact(found: Tensor, world: World, piece: Piece, scores: Scores) -> None:
    """A half-precision cache rounds keys after their rotation: once more than float64."""
    coarse = world.dtype == torch.float16 and world.shape.rotary_dim > 0
    atol = 4e-3 if coarse else 1e-5
    torch.testing.assert_close(found.double(), world.exact(piece, scores), atol=atol, rtol=1e-5)


# -- what is compared with -------------------------------------------------------------------------


def test_the_oracle_is_what_transformers_computes() -> None:
    """Its own eager functions and its rotation, on whole prompts; their softmax is in float32."""
    q, k = (torch.randn(1, heads, 40, 8, generator=generator(heads)).double() for heads in (6, 2))
    v = torch.randn(1, 2, 40, 5, generator=generator(3)).double()
    angles = torch.rand(1, 40, 4).double()
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    for mine, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        found = rotated(mine[0].transpose(0, 1), cos[0], sin[0])
        torch.testing.assert_close(found, theirs[0].transpose(0, 1))
    module: Any = SimpleNamespace(
        num_key_value_groups=3, training=False, head_dim=8, sinks=SINKS.double()
    )
    for window in (None, 7):
        hidden = torch.ones(40, 40).triu(1).bool()
        if window:
            hidden |= ~torch.ones(40, 40).triu(1 - window).bool()
        mask = torch.zeros(40, 40, dtype=torch.float64).masked_fill(hidden, -1e30)[None, None]
        cases: list[tuple[Scores, Any]] = [
            (Scores(window=window, softcap=2.0), gemma2_attention),
            (Scores(window=window, sinks=SINKS), sinks_attention),
        ]
        for scores, forward in cases:
            extra = {"softcap": 2.0} if scores.softcap else {}
            theirs, _ = forward(module, q, k, v, mask, scaling=0.3, dropout=0.0, **extra)
            rows = [x[0].transpose(0, 1) for x in (q, k, v)]
            mine = eager(rows[0], rows[1], rows[2], scores)
            torch.testing.assert_close(mine, theirs[0], atol=1e-6, rtol=1e-6)


# -- against it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prompts_chunks_and_decode_rows(
    ops: Any, shape: Shape, block_size: int, dtype: torch.dtype
) -> None:
    """Step by step: prompts of several lengths; then chunks and single rows of mixed sequences."""
    world = World(shape, [1, 70, 21, 150], block_size, dtype)
    for pieces in [
        [Piece(1, 0, 64), Piece(0, 0, 1), Piece(3, 0, 7)],
        [Piece(3, 7, 8), Piece(2, 0, 17), Piece(1, 64, 65)],
        [Piece(3, 8, 149), Piece(1, 65, 66), Piece(2, 17, 18)],
        [Piece(2, 18, 21), Piece(3, 149, 150), Piece(1, 66, 70)],
    ]:
        for piece, found in zip(pieces, world.step(pieces, Scores()), strict=True):
            assert_exact(found, world, piece, Scores())


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_models_do_to_scores(ops: Any, shape: Shape, name: str, dtype: torch.dtype) -> None:
    scores = scores_for(shape, SCORES[name])
    for block_size in (16, 3):
        world = World(shape, [140, 67], block_size, dtype)
        for pieces in [
            [Piece(0, 0, 100), Piece(1, 0, 66)],
            [Piece(0, 100, 139), Piece(1, 66, 67)],
            [Piece(0, 139, 140)],
        ]:
            for piece, found in zip(pieces, world.step(pieces, scores), strict=True):
                assert_exact(found, world, piece, scores)


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("scores", [Scores(causal=False), Scores(softcap=2.0, causal=False)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_causality_a_row_sees_its_whole_sequence(
    ops: Any, shape: Shape, scores: Scores, dtype: torch.dtype
) -> None:
    """Several sequences at once, some behind a prefix that was written before."""
    for block_size in (16, 3):
        world = World(shape, [140, 1, 67, 64], block_size, dtype)
        world.step([Piece(2, 0, 21), Piece(3, 0, 5)], scores)
        pieces = [Piece(0, 0, 140), Piece(1, 0, 1), Piece(2, 21, 67), Piece(3, 5, 64)]
        for piece, found in zip(pieces, world.step(pieces, scores), strict=True):
            assert_exact(found, world, piece, scores)


def test_large_scores_do_not_overflow(ops: Any) -> None:
    """One position takes all; and the maximum rises from span to span."""
    shape = Shape(heads=2, kv_heads=1)
    world = World(shape, [200], 16)
    world.keys[0] *= torch.linspace(1, 100, 200)[:, None, None]
    scores = Scores(scale=1.0)
    (found,) = world.step([Piece(0, 0, 200)], scores)
    torch.testing.assert_close(
        found.double(), world.exact(Piece(0, 0, 200), scores), atol=1e-3, rtol=1e-3
    )
    world.clear()
    with_sinks = Scores(scale=1.0, sinks=torch.tensor([1e4, -1e4]))
    (found,) = world.step([Piece(0, 0, 200)], with_sinks)
    exact = world.exact(Piece(0, 0, 200), with_sinks)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", CACHES, ids=str)
def test_both_layouts_of_the_heads_and_a_views_strides(ops: Any, dtype: torch.dtype) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=16, v_dim=16, rotary_dim=8)
    world = World(shape, [30], 16, dtype)
    (first,) = world.step([Piece(0, 0, 30)], Scores())
    world.clear()
    (second,) = world.step([Piece(0, 0, 30)], Scores(), heads_first=False)
    assert torch.equal(first, second)
    fused = torch.cat([t.flatten(1) for t in (world.queries[0], world.keys[0], world.values[0])], 1)
    q, k, v = (t.view(30, -1, 16) for t in fused.split([4 * 16, 2 * 16, 2 * 16], dim=1))
    world.clear()
    third = ops.attention(
        q, k, v, world.cos[0], world.sin[0], world.key_cache, world.value_cache,
        world.plan([Piece(0, 0, 30)]), 0.3,
    )  # fmt: skip
    assert torch.equal(first, third[0])


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_is_written_where(ops: Any, block_size: int, dtype: torch.dtype) -> None:
    """Every row's key and value into its slot, and nothing elsewhere; queries are not changed."""
    world = World(SHAPES["odd sizes"], [20, 9], block_size, dtype)
    before = [t.clone() for t in (*world.queries, *world.keys, *world.values)]
    pieces = [Piece(0, 0, 20), Piece(1, 0, 9)]
    world.step(pieces, Scores())
    written = torch.zeros(world.num_blocks * block_size, dtype=torch.bool)
    for piece in pieces:
        slots = world.slots(piece)
        written[slots] = True
        blocks, places = slots // block_size, slots % block_size
        assert torch.equal(
            world.value_cache[blocks, :, places].float(), world.values[piece.sequence]
        )
        exact = rotated(
            world.keys[piece.sequence].double(),
            world.cos[piece.sequence].double(),
            world.sin[piece.sequence].double(),
        )
        rtol = 1e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(
            world.key_cache[blocks, :, :, places].double(), exact, atol=1e-6, rtol=rtol
        )
    elsewhere = ~written.view(world.num_blocks, block_size)
    assert bool(world.value_cache.transpose(1, 2)[elsewhere].isnan().all())
    assert bool(world.key_cache.permute(0, 3, 1, 2)[elsewhere].isnan().all())
    after = [*world.queries, *world.keys, *world.values]
    assert all(map(torch.equal, before, after))


def test_no_rows(ops: Any) -> None:
    world = World(Shape(), [1], 16)
    none = torch.empty(0, dtype=torch.long)
    empty = [torch.empty(1, heads, 0, 16) for heads in (4, 2, 2)]
    caches = world.key_cache, world.value_cache
    out = ops.attention(*empty, None, None, *caches, ops.Plan(none, none, [], 16), 1.0)
    assert out.shape == (1, 0, 4, 16)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    dim = draw(st.integers(1, 40))
    return {
        "shape": Shape(
            kv_heads * draw(st.integers(1, 7)), kv_heads, dim, draw(st.integers(1, 70)),
            2 * draw(st.integers(0, dim // 2)),
        ),
        "lengths": draw(st.lists(st.integers(1, 150), min_size=1, max_size=3)),
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 5, 16, 24, 32, 48])),
        "scores": Scores(
            0.3,
            draw(st.none() | st.integers(1, 160)),
            draw(st.none() | st.floats(0.5, 50)),
            draw(st.none() | st.just(SINKS)),
        ),
        "seed": draw(st.integers(0, 1000)),
        "threads": draw(st.integers(1, 2)),
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_any_schedule(problem: dict[str, Any]) -> None:
    """Sequences advance by random numbers of positions, in a random order, to their ends."""
    shape, rng = problem["shape"], random.Random(problem["seed"])
    scores = problem["scores"]
    if scores.sinks is not None:
        scores = Scores(0.3, scores.window, scores.softcap, SINKS.repeat(4)[: shape.heads].clone())
    world = World(shape, problem["lengths"], problem["block_size"], seed=problem["seed"])
    done = [0] * len(world.lengths)
    with threads(problem["threads"]):
        while any(d < n for d, n in zip(done, world.lengths, strict=True)):
            pieces = []
            for i in rng.sample(range(len(done)), len(done)):
                count = min(world.lengths[i] - done[i], rng.choice([0, 1, 2, 7, 64, 100]))
                if count:
                    pieces.append(Piece(i, done[i], done[i] + count))
                    done[i] += count
            if pieces:
                for piece, found in zip(pieces, world.step(pieces, scores), strict=True):
                    assert_exact(found, world, piece, scores)


# -- a position does not depend on how it was scheduled --------------------------------------------


@pytest.mark.parametrize("name", ["plain", "window", "all"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [SHAPES["gqa"], SHAPES["odd sizes"]], ids=["gqa", "odd sizes"])
def test_a_position_has_the_same_bits_however_it_was_scheduled(
    ops: Any, shape: Shape, block_size: int, name: str
) -> None:
    """In a whole prompt, in chunks of 7, row by row; beside others; by one thread and by two."""
    scores = scores_for(shape, SCORES[name])
    dtype = CACHES[block_size % 2]
    world = World(shape, [150, 40], block_size, dtype)
    whole, other = Piece(0, 0, 150), Piece(1, 0, 40)

    def prompt() -> Tensor:
        world.clear()
        return world.step([whole], scores)[0]

    def chunks(size: int) -> Tensor:
        world.clear()
        starts = range(0, 150, size)
        pieces = [Piece(0, s, min(s + size, 150)) for s in starts]
        return torch.cat([world.step([piece], scores)[0] for piece in pieces])

    def beside() -> Tensor:
        world.clear()
        first = world.step([other, Piece(0, 0, 90)], scores)[1]
        second = world.step([Piece(0, 90, 91), Piece(1, 39, 40)], scores)[0]
        third = world.step([Piece(1, 38, 40), Piece(0, 91, 150)], scores)[1]
        return torch.cat([first, second, third])

    expected = prompt()
    for found in (
        *by_threads(prompt), *by_threads(beside), *by_threads(lambda: chunks(7)), chunks(1),
        chunks(64),
    ):  # fmt: skip
        assert torch.equal(found, expected)


def test_the_blocks_size_and_places_do_not_show(ops: Any) -> None:
    """Sixteen positions gathered out of small blocks are computed as those of one block."""
    shape = SHAPES["gqa"]
    results = [
        World(shape, [130], size).step([Piece(0, 0, 130)], Scores(window=50))[0]
        for size in BLOCK_SIZES
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
