"""Paged attention: against its formula row by row, and whole models against transformers' eager."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peftcore.ops.cpu import kernels, kernels_status
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Batch, Chunk
from server.engine.sequence import SamplingParams, Sequence
from server.models import attention, loader
from server.models.attention import paged_attention
from server.models.context import ChunkRows, ForwardContext, forward_context
from server.models.kv_pool import KVPool
from server.models.loader import prepare_model
from tests.server.models import zoo

CPU = torch.device("cpu")


@pytest.fixture(params=["kernels", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who attends."""
    assert kernels() is not None, kernels_status()
    if request.param == "torch":
        monkeypatch.setattr(attention, "select", lambda device: None)
    return request.param


# -- the formula ---------------------------------------------------------------------------------


def formula(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One row at the last of `keys`' positions. q: `[heads, d]`, keys `[context, kv_heads, d]`."""
    heads, context = q.shape[0], keys.shape[0]
    out = torch.zeros(heads, values.shape[2], dtype=torch.double)
    for head in range(heads):
        kv_head = head // (heads // keys.shape[1])
        visible = range(0 if window is None else max(0, context - window), context)
        scores = [float(q[head].double() @ keys[k, kv_head].double()) * scale for k in visible]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        weights = [math.exp(score) for score in scores]
        total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
        for weight, k in zip(weights, visible, strict=True):
            out[head] += weight / total * values[k, kv_head].double()
    return out


class Paged:
    """Sequences of random queries, keys and values over scattered blocks of one pool."""

    SIZE = 4

    def __init__(self, lengths: Seq[int], heads: int, kv_heads: int, d: int, dv: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.q = [torch.randn(n, heads, d, generator=rng) for n in lengths]
        self.k = [torch.randn(n, kv_heads, d, generator=rng) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dv, generator=rng) for n in lengths]
        num_blocks = sum(-(-n // self.SIZE) for n in lengths) + 2
        self.pool = KVPool(
            [(kv_heads, d, dv)] * 2, num_blocks=num_blocks, block_size=self.SIZE,
            dtype=torch.float32, device=CPU,
        )  # fmt: skip
        free = torch.randperm(num_blocks, generator=rng).tolist()
        self.slots, self.tables = [], []
        for n in lengths:
            self.tables.append([free.pop() for _ in range(-(-n // self.SIZE))])
            slots = torch.tensor(self.tables[-1])[:, None] * self.SIZE + torch.arange(self.SIZE)
            self.slots.append(slots.flatten()[:n])
        self.unused = [block * self.SIZE for block in free]

    def step(self, chunks: Seq[tuple[int, int, int]], **options: object) -> list[Tensor]:
        """Compute positions [start, end) of sequences."""
        rows: list[ChunkRows] = []
        row = 0
        for i, start, end in chunks:
            table = self.tables[i][: -(-end // self.SIZE)]
            rows.append(ChunkRows(row, row + end - start, start, table))
            row += end - start

        def packed(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensors[i][s:e] for i, s, e in chunks]).transpose(0, 1)[None]

        slots = torch.cat([self.slots[i][s:e] for i, s, e in chunks])
        with forward_context(ForwardContext(self.pool, slots, rows)):
            out, weights = paged_attention(
                SimpleNamespace(layer_idx=1), packed(self.q), packed(self.k), packed(self.v),
                None, **options,
            )  # type: ignore[arg-type]  # fmt: skip
        assert weights is None
        assert out.shape == (1, row, self.q[0].shape[1], self.v[0].shape[2])
        return list(out[0].split([e - s for _, s, e in chunks]))

    def expected(self, i: int, position: int, **options: object) -> Tensor:
        scale = options.get("scaling") or self.q[i].shape[2] ** -0.5
        return formula(
            self.q[i][position], self.k[i][: position + 1], self.v[i][: position + 1], scale,
            options.get("sliding_window"), options.get("softcap"), options.get("s_aux"),
        )  # type: ignore[arg-type]  # fmt: skip


#: Steps over sequences of 13, 5, 22, 1 and 9 positions: chunks, then decodes of unlike lengths.
STEPS = [
    [(0, 0, 6), (2, 0, 1), (1, 0, 3)],
    [(2, 1, 2), (0, 6, 7), (1, 3, 4), (3, 0, 1)],
    [(2, 2, 19), (0, 7, 12), (4, 0, 8)],
    [(1, 4, 5), (2, 19, 20), (4, 8, 9), (0, 12, 13)],
    [(2, 20, 22)],
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dv"), [(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 4, 4), (4, 4, 12, 6)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        {"sliding_window": 1},
        {"sliding_window": 4},
        {"sliding_window": 100},
        {"softcap": 1.5},
        {"s_aux": True},
        {"s_aux": True, "softcap": 2.0, "sliding_window": 5, "scaling": 0.3},
    ],
    ids=str,
)
def test_every_row_is_the_formula_s(
    heads: int, kv_heads: int, d: int, dv: int, options: dict, by: str
) -> None:
    if options.get("s_aux"):
        options = options | {"s_aux": torch.linspace(-1, 2, heads)}
    paged = Paged([13, 5, 22, 1, 9], heads, kv_heads, d, dv)
    for chunks in STEPS:
        for (i, start, end), rows in zip(chunks, paged.step(chunks, **options), strict=True):
            for position in range(start, end):
                expected = paged.expected(i, position, **options)
                torch.testing.assert_close(
                    rows[position - start].double(), expected, atol=1e-5, rtol=1e-5
                )


def test_only_its_layer_and_slots_are_written(by: str) -> None:
    paged = Paged([13, 5, 22, 1, 9], 4, 2, 8, 6)
    for tensors in (*paged.pool.keys, *paged.pool.values):
        tensors.fill_(7.0)
    paged.step([(0, 0, 6), (1, 0, 1)])
    written = {*paged.slots[0][:6].tolist(), int(paged.slots[1][0])}
    every = torch.arange(paged.pool.num_blocks * paged.SIZE)
    for kept, untouched, source in zip(
        paged.pool.read(1, every), paged.pool.read(0, every), (paged.k, paged.v), strict=True
    ):
        changed = (kept != 7).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) == written
        assert torch.equal(kept[paged.slots[0][:6]], source[0][:6])
        assert (untouched == 7).all()


def test_what_others_hold_does_not_spread(by: str) -> None:
    """Not even NaN, in slots of others, in unused ones, and in later ones of the same blocks."""
    paged = Paged([13, 5, 22, 1, 9], 4, 2, 8, 8)
    for chunks in STEPS[:3]:
        paged.step(chunks)
    clean = paged.step(STEPS[3])
    own = {int(s) for i, _, end in STEPS[3] if i != 0 for s in paged.slots[i][:end]}
    others = [s for s in range(paged.pool.num_blocks * paged.SIZE) if s not in own]
    nan = torch.full((len(others), 2, 8), torch.nan)
    paged.pool.write(1, torch.tensor(others), nan, nan)
    spoiled = paged.step(STEPS[3])
    assert spoiled[3].isnan().all(), "the sequence that reads them"
    for before, after in zip(clean[:3], spoiled[:3], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pool_of_less_precision(dtype: torch.dtype, by: str) -> None:
    paged, exact = (Paged([13, 5, 22, 1, 9], 4, 2, 8, 8) for _ in range(2))
    paged.pool = KVPool(
        [(2, 8, 8)] * 2, num_blocks=paged.pool.num_blocks, block_size=paged.SIZE,
        dtype=dtype, device=CPU,
    )  # fmt: skip
    for chunks in STEPS:
        for got, want in zip(paged.step(chunks), exact.step(chunks), strict=True):
            assert got.dtype == torch.float32
            assert 0 < (got - want).abs().max() < 0.05


def test_what_half_precision_cannot_hold_is_its_largest_number(by: str) -> None:
    """An infinite key would make the weights of all positions NaN."""
    paged = Paged([3], 4, 2, 8, 8)
    paged.k[0][1, 0], paged.v[0][2, 0] = 1e6, -1e6
    paged.pool = KVPool(
        [(2, 8, 8)] * 2, num_blocks=paged.pool.num_blocks, block_size=paged.SIZE,
        dtype=torch.float16, device=CPU,
    )  # fmt: skip
    (out,) = paged.step([(0, 0, 3)])
    assert out.isfinite().all()
    keys, values = paged.pool.read(1, paged.slots[0][:3])
    assert keys.max() == 65504
    assert values.min() == -65504


def test_there_is_no_attention_outside_of_a_step() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="outside of forward_context"):
        paged_attention(SimpleNamespace(layer_idx=0), q, q, q, None)  # type: ignore[arg-type]


# -- whole models --------------------------------------------------------------------------------

#: Past every window and twice the smallest; one beside a power of two, where decodes group anew.
LENGTHS = (1, 2, 9, 16, 17, 33, 41)


def plans(seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps until all sequences are computed: some rest, some decode, some take a chunk."""
    rng = random.Random(seed)
    done = [0] * len(LENGTHS)
    while any(d < n for d, n in zip(done, LENGTHS, strict=True)):
        step = []
        for i in rng.sample(range(len(LENGTHS)), len(LENGTHS)):
            num = min(LENGTHS[i] - done[i], rng.choice([0, 1, 1, 1, 2, 7, 13]))
            if num:
                step.append((i, done[i], done[i] + num))
                done[i] += num
        if step:
            yield step


@pytest.mark.parametrize("name", zoo.SERVED)
def test_a_model_s_logits_are_those_of_eager_attention(
    name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of every chunk and decode, however the sequences are cut."""
    model = zoo.make(name)
    rng = random.Random(5)
    prompts = [[rng.randrange(zoo.VOCAB) for _ in range(n)] for n in LENGTHS]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = [model(torch.tensor([p]), use_cache=False).logits[0] for p in prompts]
    if by == "torch":
        monkeypatch.setattr(loader, "select", lambda device: None)
    loaded = prepare_model(model, "none", CPU)
    for seed in range(3):
        block_size = (3, 4, 16)[seed]
        num_blocks = sum(-(-n // block_size) for n in LENGTHS) + 3
        pool = KVPool(
            loaded.base.kv_shapes, num_blocks=num_blocks, block_size=block_size,
            dtype=torch.float32, device=CPU,
        )  # fmt: skip
        for tensor in (*pool.keys, *pool.values):
            tensor.fill_(torch.nan)  # what is read and was not written shows
        runner = ModelRunner(loaded, pool, lambda digest: pytest.fail("no adapters here"))
        free = rng.sample(range(1, num_blocks), num_blocks - 1)  # block 0 is nobody's
        sequences = [Sequence((str(i), 0), p, SamplingParams()) for i, p in enumerate(prompts)]
        for step in plans(seed):
            for i, _, end in step:
                seq = sequences[i]
                seq.token_ids = prompts[i][:end]
                while len(seq.block_table) * block_size < end:
                    seq.block_table.append(free.pop())
            batch = Batch([Chunk(sequences[i], start, end - start) for i, start, end in step])
            logits = runner.execute(batch)
            assert logits.shape == (len(step), zoo.VOCAB)
            for (i, _, end), row in zip(step, logits, strict=True):
                difference = (row - expected[i][end - 1]).abs().max() / expected[i].std()
                assert difference < 1e-4, f"{name}: sequence {i} at {end}"


def test_the_comparison_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is wrong by one, in the decode's mask alone."""
    original = attention._mask

    def mask(context: ForwardContext, group: object, window: int | None) -> Tensor:
        decodes = isinstance(group, attention._DecodeRows)
        return original(context, group, window + 1 if decodes and window else window)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_mask", mask)
    monkeypatch.setattr(attention, "select", lambda device: None)
    monkeypatch.setattr(loader, "probe", lambda *args: None)
    with pytest.raises(AssertionError, match="mistral: sequence"):
        test_a_model_s_logits_are_those_of_eager_attention("mistral", "torch", monkeypatch)
