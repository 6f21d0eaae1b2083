"""Updates, scales and biases by Triton against `reference`, in float64."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peftcore.ops.tiles import tiled
from tests.peftcore.cpu.cases import At, Rows, absolute, adapted, scaled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class World:
    """Adapters on a device, made once each: what the CPU kernels' cases are, for Triton."""

    def __init__(self, ops: Any, device: torch.device) -> None:
        self.ops, self.device = ops, device
        self._made: dict[int, tuple[Any, Any]] = {}

    def adapter(self, modules: dict[int, At]) -> Any:
        if id(modules) not in self._made:
            made = self.ops.Adapter()
            for id_, at in modules.items():
                fields = vars(at).items()
                moved = {k: v.to(self.device) for k, v in fields if isinstance(v, Tensor)}
                replace(at, **moved).put(made, id_)
            self._made[id(modules)] = made, modules
        return self._made[id(modules)][0]

    def given(self, segments: Sequence[Rows]) -> list[tuple[int, int, Any, float]]:
        return [(s.start, s.end, self.adapter(s.adapter), s.weight) for s in segments]

    def batch(self, segments: Sequence[Rows]) -> Any:
        return self.ops.Batch(self.given(segments))

    def add(self, ys: Sequence[Tensor], x: Tensor, ids: Sequence[int], batch: Any) -> list[Tensor]:
        found = [y.clone().to(self.device) for y in ys]
        self.ops.add_to_all_(found, x.to(self.device), ids, batch)
        return [y.cpu() for y in found]


@pytest.fixture
def world(ops: Any, device: torch.device) -> World:
    return World(ops, device)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_added(
    world: World, segments: Sequence[Rows], outs: dict[int, int], num_rows: int, in_: int
) -> None:
    """Every module's y, within float32's rounding of the sums."""
    x = randn(num_rows, in_)
    ys = [randn(num_rows, out, seed=id_) for id_, out in outs.items()]
    results = world.add(ys, x, list(outs), world.batch(segments))
    for id_, y, found in zip(outs, ys, results, strict=True):
        exact = adapted(y, x, id_, segments)
        size = adapted(y.abs() + 1, x.abs(), id_, absolute(segments))
        error = ((found.double() - exact).abs() / size).max().item()
        assert error < 3e-6, (id_, error)
        covered = torch.zeros(num_rows, dtype=torch.bool)
        for s in segments:
            if id_ in s.adapter:
                covered[s.start : s.end] = True
        assert torch.equal(found[~covered], y[~covered])


def test_every_rank_dtype_and_kind_in_one_batch(world: World) -> None:
    """Ranks 1 to 128, vectors or none, odd widths, empty segments, one row and several blocks,
    rows of the base between them; three modules of one input, at some of which an adapter does
    nothing; inputs that are split."""
    rng = random.Random(0)
    for in_, outs in [(33, {5: 17, 3: 40, 9: 1}), (1100, {0: 130, 7: 16})]:
        segments, row = [], 0
        for i, rank in enumerate((1, 2, 7, 8, 15, 16, 17, 33, 64, 100, 128, 0)):
            modules = {
                id_: At.make(in_, out, rank, dtype=rng.choice(DTYPES), seed=i,
                                vectors=rng.choice(["", "b", "o", "ob", "iob"]))
                for id_, out in outs.items()
                if rng.random() < 0.8 or rank in (1, 128)
            }  # fmt: skip
            num = rng.choice([1, 1, 3, 0, 18])
            segments.append(Rows(row, row + num, modules, rng.uniform(-2, 2)))
            row += num + rng.choice([0, 0, 1])
        assert_added(world, segments, outs, row + 1, in_)


def test_many_segments(world: World) -> None:
    """A thousand adapters of one row each, at two modules."""
    many = [
        {0: At.make(32, 32, 1 + i % 8, seed=i), 1: At.make(32, 16, 1, seed=i)} for i in range(1000)
    ]
    segments = [Rows(i, i + 1, modules) for i, modules in enumerate(many)]
    x, y = randn(1000, 32), randn(1000, 32, seed=1)
    (found,) = world.add([y], x, [0], world.batch(segments))
    exact = y.double() + torch.stack(
        [
            at.scale * (at.b.double() @ (at.a.double() @ row.double()))
            for at, row in zip((m[0] for m in many), x, strict=True)
        ]
    )
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)


def test_mixtures_and_any_overlap(world: World) -> None:
    """Segments over the same rows, and over some of one another's; the same adapter twice."""
    ats = [
        {0: At.make(40, 24, rank, dtype=dtype, vectors=vectors, seed=rank)}
        for rank, dtype, vectors in [
            (4, torch.float32, "b"), (40, torch.float16, ""), (3, torch.bfloat16, "b"),
            (0, torch.float32, "o"),
        ]
    ]  # fmt: skip
    segments = [Rows(2, 27, ats[0], 0.5), Rows(2, 27, ats[1], -0.25), Rows(25, 32, ats[2], 2.0),
                Rows(2, 27, ats[0], 0.125), Rows(30, 31, ats[3])]  # fmt: skip
    assert_added(world, segments, {0: 24}, 33, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_and_outputs_in_half_precision(world: World, dtype: torch.dtype) -> None:
    """One rounding of the result, whatever is summed."""
    at = {0: At.make(48, 32, 20, dtype=torch.float16, vectors="ob")}
    segments = [Rows(0, 5, at)]
    x, y = randn(6, 48).to(dtype), randn(6, 32, seed=1).to(dtype)
    (found,) = world.add([y], x, [0], world.batch(segments))
    exact = adapted(y.float(), x.float(), 0, segments)
    eps = torch.finfo(dtype).eps
    # On a GPU the shrunk rows are rounded to tf32 where x is half.
    tolerance = max(eps, 1e-3) if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.double(), exact, atol=tolerance * 4, rtol=tolerance)
    assert found.dtype == dtype


def test_inputs_are_scaled_in_a_copy(world: World) -> None:
    ats = [
        {0: At.make(40, 8, 2, vectors="i")},
        {0: At.make(40, 8, vectors="iob", seed=1), 4: At.make(40, 9, 3)},
        {0: At.make(40, 8, 3)},
    ]
    segments = [Rows(1, 20, ats[0]), Rows(20, 21, ats[1]), Rows(21, 25, ats[2])]
    batch, x = world.batch(segments), randn(26, 40)
    found = world.ops.scale_input(x.to(world.device), 0, batch).cpu()
    torch.testing.assert_close(found.double(), scaled(x, 0, segments), atol=0, rtol=1.2e-7)
    assert torch.equal(x, randn(26, 40))
    given = x.to(world.device)
    assert world.ops.scale_input(given, 4, batch) is given


def test_a_linear_map_with_what_a_batch_does(world: World) -> None:
    """Of several modules; where one scales its input, each reads its own."""
    bases = [torch.nn.Linear(24, out).to(world.device) for out in (16, 20)]
    x = randn(5, 24)
    for vectors in ("ob", "iob"):
        modules = {0: At.make(24, 16, 4, vectors=vectors), 1: At.make(24, 20, 4, seed=1)}
        segments = [Rows(1, 4, modules)]
        with torch.no_grad():
            results = world.ops.linear(x.to(world.device), bases, [0, 1], world.batch(segments))
            for id_, (base, y) in enumerate(zip(bases, results, strict=True)):
                given = scaled(x, id_, segments)
                exact = base.cpu().double()(given)
                base.float().to(world.device)
                exact = adapted(exact, given, id_, segments)
                torch.testing.assert_close(y.cpu().double(), exact, atol=2e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_whatever_stands_beside_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its segment alone, longer, at another place, beside other adapters and modules.

    The interpreter multiplies tiles by BLAS, which sums a tile's first rows in another order than
    its last: here by a product in which, as in a GPU's, every element is summed alike.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
            products = a.data[:, :, None] * b.data[None]
            return TensorHandle(products.sum(1, dtype=np.float32) + d.data, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    ats = [
        {0: At.make(1100, 70, rank, dtype=dtype, vectors="ob", seed=rank),
         1: At.make(1100, 33, rank, seed=rank)}
        for rank, dtype in [(1, torch.float32), (33, torch.float16), (16, torch.bfloat16)]
    ]  # fmt: skip
    whole = [
        Rows(0, 3, ats[0]),
        Rows(3, 23, ats[1]),
        Rows(3, 23, ats[2], 0.5),
        Rows(24, 26, ats[2]),
    ]
    x, ys = randn(26, 1100), [randn(26, 70, seed=1), randn(26, 33, seed=2)]
    together = world.add(ys, x, [0, 1], world.batch(whole))
    for start, stop in [(0, 1), (2, 5), (22, 23), (5, 21), (25, 26)]:
        segments = [
            replace(s, start=max(s.start, start) - start, end=min(s.end, stop) - start)
            for s in whole
            if s.start < stop and s.end > start
        ]
        batch = world.batch(segments)
        for id_ in (0, 1):
            (alone,) = world.add([ys[id_][start:stop]], x[start:stop], [id_], batch)
            assert torch.equal(alone, together[id_][start:stop]), (start, stop, id_)


def test_a_static_batch_becomes_another_steps(world: World) -> None:
    """In the same memory, launched over the same grid, and refused where it has no room."""
    ats = [{0: At.make(24, 16, rank, vectors="b", seed=rank)} for rank in (3, 20, 8)]
    capacity = world.ops.Capacity(segments=3, blocks=4, entries=5, items=8)
    batch = world.ops.Batch([], capacity, world.device)
    address = batch.segments.data_ptr()
    x, y = randn(40, 24), randn(40, 16, seed=1)
    steps = [
        [Rows(0, 17, ats[0]), Rows(17, 18, ats[1])],
        [],
        [Rows(3, 9, ats[2], 0.5), Rows(3, 9, ats[1])],
    ]
    for segments in steps:
        batch.update_(world.given(segments))
        assert (batch.segments.data_ptr(), batch.capacity) == (address, capacity)
        (found,) = world.add([y], x, [0], batch)
        torch.testing.assert_close(found.double(), adapted(y, x, 0, segments), atol=1e-4, rtol=1e-5)
        assert torch.equal(world.ops.scale_input(x.to(world.device), 0, batch).cpu(), x)
    with pytest.raises(ValueError, match="does not fit"):
        batch.update_(world.given([Rows(0, 65, ats[0])]))


def test_a_static_batch_takes_an_offer_or_stays_as_it_is(world: World) -> None:
    """One that scales no inputs has no launches for it, and takes no adapter that does."""
    plain, scaling = {0: At.make(24, 16, 3)}, {0: At.make(24, 16, 3, vectors="i")}
    capacity = world.ops.Capacity(segments=2, blocks=2, entries=2, items=2)
    batch = world.ops.Batch([], capacity, world.device, may_scale_inputs=False)
    assert batch.acts(0)
    assert not batch.scales(0)
    x, y = randn(40, 24), randn(40, 16, seed=1)
    taken = [Rows(3, 9, plain)]
    assert batch.offer_(world.given(taken))
    for refused in ([Rows(0, 40, plain)], [Rows(0, 2, scaling)]):
        assert not batch.offer_(world.given(refused))
        (found,) = world.add([y], x, [0], batch)
        torch.testing.assert_close(found.double(), adapted(y, x, 0, taken), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="an adapter scales inputs"):
        batch.update_(world.given([Rows(0, 2, scaling)]))


def test_what_touches_nothing_changes_nothing(world: World) -> None:
    at = {1: At.make(8, 4, 2)}
    batch = world.batch([Rows(0, 3, at), Rows(3, 3, {2: At.make(8, 4, 2, vectors="i")})])
    assert [batch.touches(id_) for id_ in range(4)] == [False, True, True, False]
    x, y = randn(3, 8), randn(3, 4)
    for id_ in (0, 2, 3):
        (found,) = world.add([y], x, [id_], batch)
        assert torch.equal(found, y)
        assert torch.equal(world.ops.scale_input(x, id_, batch), x)
    assert torch.equal(world.add([y], x, [1], world.ops.Batch([]))[0], y)
    assert torch.equal(world.add([y[:0]], x[:0], [1], world.batch([Rows(0, 0, at)]))[0], y[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_updates_that_lie_in_one_buffer(world: World, dtype: torch.dtype) -> None:
    """They are what they are when they are set tensor by tensor."""
    at = At.make(40, 20, 3, dtype=dtype)
    assert at.a is not None
    assert at.b is not None
    buffer = torch.zeros(4096, dtype=torch.uint8)
    a, b = at.a.contiguous().view(-1), tiled(at.b).view(-1)
    for start, values in ((64, a), (1024, b)):
        raw = values.view(torch.uint8)
        buffer[start : start + len(raw)] = raw
    buffer = buffer.to(world.device)
    adapter = world.ops.Adapter()
    adapter.set_low_rank(buffer, [(7, 40, 20, 3, dtype, at.scale, 64, 1024, -1)])
    x, y = randn(5, 40), randn(5, 20)
    (found,) = world.add([y], x, [7], world.ops.Batch([(0, 5, adapter, 0.5)]))
    (expected,) = world.add([y], x, [7], world.batch([Rows(0, 5, {7: at}, 0.5)]))
    assert torch.equal(found, expected)
    assert not torch.equal(found, y)
    with pytest.raises(ValueError, match=r"^b: .* outside the buffer$"):
        world.ops.Adapter().set_low_rank(buffer, [(7, 40, 20, 3, dtype, 1.0, 64, 4064, -1)])
    with pytest.raises(ValueError, match=r"int8 is not supported"):
        world.ops.Adapter().set_low_rank(buffer, [(7, 40, 20, 3, torch.int8, 1.0, 0, 0, 0)])


def test_what_does_not_fit_is_refused(world: World) -> None:
    at = At.make(8, 4, 2, vectors="ob")
    adapter = world.adapter({0: at})
    batch = world.ops.Batch([(0, 3, adapter, 1.0)])
    with pytest.raises(ValueError, match="rows"):
        world.add([torch.zeros(2, 4)], torch.zeros(2, 8), [0], batch)
    with pytest.raises(ValueError, match="module 0"):
        world.add([torch.zeros(3, 5)], torch.zeros(3, 8), [0], batch)
    with pytest.raises(ValueError, match="y:"):
        world.add([torch.zeros(4, 4)], torch.zeros(3, 8), [0], batch)
    with pytest.raises(ValueError, match="segment"):
        world.ops.Batch([(3, 1, adapter, 1.0)])
    for wrong in (
        replace(at, a=at.a[:, :7]), replace(at, bias=at.bias[:3]), replace(at, a=at.a.double()),
        replace(at, bias=at.bias.half()), replace(at, a=None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"come together|contiguous|supported"):
            wrong.put(world.ops.Adapter(), 0)
