"""Triton's paged attention against eager attention in float64; a row alone and among others.

Without a GPU, in Triton's interpreter: what it shows is the kernels' arithmetic, not their code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sinks_attention

from tests.peftcore.cpu.paged import Piece, Scores, Shape, World

pytest.importorskip("triton", reason="the package triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from peftcore.ops.triton import attention
from peftcore.ops.triton.attention import Capacity, Chunk, Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.5, -6.0, 2.0, 0.1])
SCORES = {
    "plain": Scores(),
    "one position": Scores(window=1),
    "window": Scores(window=5),
    "long window": Scores(window=70),
    "softcap": Scores(softcap=0.9),
    "sinks": Scores(sinks=SINKS),
    "all": Scores(window=33, softcap=3.0, sinks=SINKS),
}


class Paged(World):
    """The same sequences, attended by Triton."""

    def clear(self) -> None:
        super().clear()
        self.key_cache, self.value_cache = self.key_cache.to(DEVICE), self.value_cache.to(DEVICE)

    def chunks(self, pieces: Sequence[Piece]) -> list[Chunk]:
        found: list[Chunk] = []
        row = 0
        for piece in pieces:
            table = self.tables[piece.sequence][: -(-piece.stop // self.block_size)].tolist()
            found.append((row, row + piece.stop - piece.start, piece.start, table))
            row += piece.stop - piece.start
        return found

    def rows(self, of: Sequence[Tensor], pieces: Sequence[Piece], padding: int = 0) -> Tensor:
        x = torch.cat([of[p.sequence][p.start : p.stop] for p in pieces])
        x = torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)])
        # Heads first in memory, as models give them.
        return x.to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)

    def step(  # type: ignore[override]
        self, pieces: Sequence[Piece], scores: Scores, plan: Plan | None = None, padding: int = 0
    ) -> list[Tensor]:
        """padding: rows behind the pieces' that belong to nobody; with a plan that has room."""
        slots = torch.cat([*(self.slots(p) for p in pieces), torch.full((padding,), -1)])
        keys, values = (self.rows(x, pieces, padding) for x in (self.keys, self.values))
        attention.write(slots.to(DEVICE), keys, values, self.key_cache, self.value_cache)
        plan = plan or Plan.of(self.chunks(pieces), DEVICE)
        sinks = None if scores.sinks is None else scores.sinks[: self.shape.heads].to(DEVICE)
        how = attention.Scores(scores.scale, scores.window, scores.softcap, sinks, scores.causal)
        queries = self.rows(self.queries, pieces, padding)
        out = attention.attend(plan, queries, self.key_cache, self.value_cache, how).cpu()
        assert out.shape == (len(slots), self.shape.heads, self.shape.v_dim)
        assert out.dtype == torch.float32
        assert (out[len(slots) - padding :] == 0).all()
        return list(out[: len(slots) - padding].split([p.stop - p.start for p in pieces]))

    def check(self, pieces: Sequence[Piece], scores: Scores) -> None:
        own = scores
        if scores.sinks is not None:
            own = Scores(scores.scale, scores.window, scores.softcap, SINKS[: self.shape.heads])
        for piece, found in zip(pieces, self.step(pieces, scores), strict=True):
            expected = self.exact(piece, own)
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


#: Two sequences begin; chunks and single rows are mixed; single rows over several blocks.
STEPS = [
    [Piece(1, 0, 3), Piece(0, 0, 1), Piece(2, 0, 66)],
    [Piece(2, 66, 67), Piece(1, 3, 4), Piece(0, 1, 20)],
    [Piece(0, 20, 21), Piece(1, 4, 5), Piece(2, 67, 68)],
    [Piece(2, 68, 69)],
]


def fill(world: Paged, sequence: int, length: int) -> None:
    """Put the first positions into the cache, without attending."""
    piece = [Piece(sequence, 0, length)]
    keys, values = (world.rows(x, piece) for x in (world.keys, world.values))
    slots = world.slots(piece[0]).to(DEVICE)
    attention.write(slots, keys, values, world.key_cache, world.value_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=2, kv_heads=2, dim=16, v_dim=16),
        Shape(heads=6, kv_heads=2, dim=48, v_dim=48),
        Shape(heads=8, kv_heads=1, dim=80, v_dim=80),
        Shape(heads=3, kv_heads=3, dim=10, v_dim=7),
    ],
    ids=str,
)
def test_chunks_and_single_rows(shape: Shape, dtype: torch.dtype) -> None:
    """Heads' sizes that are no powers of two; 1, 3 and 8 heads of a kv head; three caches."""
    world = Paged(shape, [21, 5, 69], block_size=8 if shape.dim != 10 else 3, dtype=dtype)
    for pieces in STEPS:
        world.check(pieces, Scores())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_queries_of_half_precision(dtype: torch.dtype) -> None:
    world = Paged(Shape(), [12], block_size=4, dtype=torch.float16)
    fill(world, 0, 12)
    for pieces in ([Piece(0, 4, 11)], [Piece(0, 11, 12)]):
        queries = world.rows(world.queries, pieces).to(dtype)
        plan = Plan.of(world.chunks(pieces), DEVICE)
        caches = world.key_cache, world.value_cache
        found = attention.attend(plan, queries, *caches, attention.Scores(0.3))
        assert found.dtype == dtype
        expected = world.exact(pieces[0], Scores())
        torch.testing.assert_close(found.cpu().double(), expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("name", SCORES)
def test_ways_of_scoring(name: str) -> None:
    world = Paged(Shape(heads=4, kv_heads=2), [21, 5, 69], block_size=4)
    for pieces in STEPS:
        world.check(pieces, SCORES[name])


def test_more_heads_than_a_program_has_queries() -> None:
    """70 query heads of one kv head: in a single row, and in tiles that end within a row."""
    world = Paged(Shape(heads=70, kv_heads=1), [4], block_size=4)
    world.check([Piece(0, 0, 3)], Scores())
    world.check([Piece(0, 3, 4)], Scores())


@pytest.mark.parametrize("block_size", [4, 16])
def test_an_encoder_s_rows_see_their_whole_sequence(block_size: int) -> None:
    """A sequence of more rows than a tile too: all its tiles see its end."""
    world = Paged(Shape(heads=2, kv_heads=2), [70, 1, 9], block_size=block_size)
    scores = Scores(causal=False)
    world.check([Piece(2, 0, 9), Piece(0, 0, 70), Piece(1, 0, 1)], scores)


@pytest.mark.parametrize("scores", [Scores(), SCORES["all"], Scores(window=600)], ids=str)
def test_long_contexts_are_split(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts at either side of the parts' borders, and one that takes longer parts."""
    monkeypatch.setattr(attention, "MAX_SPLITS", 4)
    lengths = [255, 256, 257, 700, 1400]
    world = Paged(Shape(heads=4, kv_heads=2), [n + 1 for n in lengths], block_size=16)
    for i, n in enumerate(lengths):
        fill(world, i, n)
    pieces = [Piece(i, n, n + 1) for i, n in enumerate(lengths)]
    assert Plan.of(world.chunks(pieces), DEVICE).num_splits == 4
    world.check(pieces, scores)


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    """Beside longer contexts, whose parts make the grid another; and beside chunks."""
    world = Paged(Shape(heads=6, kv_heads=2), [40, 300, 900, 70], block_size=16)
    for i, n in enumerate((39, 299, 899, 3)):
        fill(world, i, n)
    pieces = [Piece(0, 39, 40), Piece(3, 3, 70), Piece(1, 299, 300), Piece(2, 899, 900)]
    for scores in (Scores(), SCORES["all"]):
        together = world.step(pieces, scores)
        for piece, beside in zip(pieces, together, strict=True):
            assert torch.equal(world.step([piece], scores)[0], beside)
        backwards = world.step(pieces[::-1], scores)[::-1]
        assert all(torch.equal(a, b) for a, b in zip(together, backwards, strict=True))


def test_what_others_hold_does_not_spread() -> None:
    """The caches are NaN where nothing was written, and here before a row's window, too."""
    world = Paged(Shape(), [30, 9], block_size=8)
    for i, n in enumerate((29, 8)):
        fill(world, i, n)
    hidden = world.slots(Piece(0, 0, 24))
    block, place = hidden // 8, hidden % 8
    world.key_cache[block, :, :, place] = torch.nan
    world.value_cache[block, :, place] = torch.nan
    pieces = [Piece(0, 29, 30), Piece(1, 8, 9)]
    world.check(pieces, Scores(window=6))
    spoiled, clean = world.step(pieces, Scores())
    assert spoiled.isnan().all()
    assert clean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_written_is_what_torch_rounds_to(given: torch.dtype, dtype: torch.dtype) -> None:
    """And what the cache cannot hold is its largest number; NaN stays; other slots stay."""
    g = torch.Generator().manual_seed(0)
    keys = (torch.randn(11, 2, 10, generator=g) * 3).to(given)
    values = (torch.randn(11, 2, 7, generator=g) * 3).to(given)
    keys[0, 0, 0], keys[1, 1, 9], values[2, 0, 6] = 3e38, -torch.inf, torch.nan
    slots = torch.randperm(20, generator=g)[:11]
    slots[4], slots[10] = -1, -1
    key_cache = torch.full((5, 2, 10, 4), 9.0, dtype=dtype)
    value_cache = torch.full((5, 2, 4, 7), 9.0, dtype=dtype)
    expected = [key_cache.clone(), value_cache.clone()]
    most = torch.finfo(dtype).max
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot // 4, :, :, slot % 4] = keys[i].float().clamp(-most, most).to(dtype)
            expected[1][slot // 4, :, slot % 4] = values[i].float().clamp(-most, most).to(dtype)
    found = [key_cache.to(DEVICE), value_cache.to(DEVICE)]
    attention.write(slots.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), found[0], found[1])
    # The interpreter cuts bfloat16 off, which a GPU rounds.
    rtol = 2**-7 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rtol, atol=0, equal_nan=True)


# -- plans ---------------------------------------------------------------------------------------


def test_a_plan_is_used_again_where_it_lies() -> None:
    """As a captured graph does: one plan, its buffers in place, with fewer rows and then more; rows
    of nobody are zeros and write nothing."""
    world, exact = (Paged(Shape(), [40, 300, 9], block_size=8) for _ in range(2))
    for i, n in enumerate((30, 290, 3)):
        fill(world, i, n)
        fill(exact, i, n)
    plan = Plan(Capacity(singles=4, tiles=0, blocks=64, context_len=600), DEVICE)
    places = [plan.singles.data_ptr(), plan.blocks.data_ptr()]
    for t, sequences in enumerate([[0, 1, 2], [1], [2, 0]]):
        starts = (30 + t, 290 + t, 3 + t)
        pieces = [Piece(i, starts[i], starts[i] + 1) for i in sequences]
        for i in range(3):
            fill(world, i, starts[i])
            fill(exact, i, starts[i])
        plan.update_(world.chunks(pieces))
        before = world.key_cache.isnan().sum()
        found = world.step(pieces, Scores(), plan, padding=4 - len(pieces))
        assert before - world.key_cache.isnan().sum() == len(pieces) * 2 * 16
        for a, b in zip(found, exact.step(pieces, Scores()), strict=True):
            assert torch.equal(a, b)
    assert places == [plan.singles.data_ptr(), plan.blocks.data_ptr()]


@pytest.mark.parametrize(
    ("chunks", "lacking"),
    [
        ([(0, 1, 0, [1]), (1, 2, 0, [2])], "singles"),
        ([(0, 65, 0, [1, 2])], "tiles"),
        ([(0, 1, 40, [1, 2, 3, 4])], "blocks"),
        ([(0, 1, 90, [1])], "context_len"),
    ],
)
def test_what_a_plan_has_no_room_for(chunks: list[Chunk], lacking: str) -> None:
    plan = Plan(Capacity(singles=1, tiles=1, blocks=3, context_len=80), DEVICE)
    plan.update_([(0, 1, 1, [7])])
    kept = plan.singles.tolist()
    with pytest.raises(ValueError, match=f"no room for .*: {lacking}$"):
        plan.update_(chunks)
    assert plan.singles.tolist() == kept


# -- transformers' own ---------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_transformers_eager_functions(kind: str, window: int | None) -> None:
    """A prompt of each model's own function: softcap, sinks, window."""
    world = Paged(Shape(heads=6, kv_heads=2, dim=16, v_dim=16), [30], block_size=8)
    module: Any = SimpleNamespace(
        num_key_value_groups=3, training=False, head_dim=16, sinks=SINKS[:6]
    )
    hidden = torch.ones(30, 30).triu(1).bool()
    if window:
        hidden |= ~torch.ones(30, 30).triu(1 - window).bool()
    mask = torch.zeros(30, 30).masked_fill(hidden, -1e30)[None, None]
    extra = {"softcap": 2.0} if kind == "gemma2" else {}
    forward = gemma2_attention if kind == "gemma2" else sinks_attention
    q, k, v = (x[0].transpose(0, 1)[None] for x in (world.queries, world.keys, world.values))
    theirs, _ = forward(module, q, k, v, mask, scaling=0.3, dropout=0.0, **extra)
    scores = Scores(window=window, softcap=2.0) if extra else Scores(window=window, sinks=SINKS)
    (ours,) = world.step([Piece(0, 0, 30)], scores)
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)
