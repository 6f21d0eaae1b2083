"""Packed, copied to an offset of an arena, bound: every tensor as the file had it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore.arena import ALIGNMENT, AdapterArena
from peftcore.base import BaseModel
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.ops.segments import module_id
from peftcore.ops.tiles import num_tiles, tiled, untiled
from peftcore.packing import (
    BoundAdapter,
    ModuleWeights,
    PackedAdapter,
    Place,
    bind,
    pack,
    packed_size,
    read_packed,
    save_packed,
)
from peftcore.primitives import (
    BiasDelta,
    Bottleneck,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    OutputScale,
    PrefixKV,
    Primitive,
    RowOverride,
    VirtualTokens,
    tensors_of,
)
from peftcore.program import AdapterProgram
from tests import tiny
from tests.peftcore.worlds import World

#: The dtypes that factors are kept in where they fit, by their names.
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def of(*primitives: Primitive) -> AdapterProgram:
    return AdapterProgram("d", "ANY", primitives)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


# -- what the tests compare with ---------------------------------------------------------------


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Is every value one of the half precision's? By numpy, or by the bits."""
    values = tensor.detach().float().contiguous()
    if dtype == torch.bfloat16:
        return not bool((values.view(torch.int32) & 0xFFFF).any())
    with np.errstate(over="ignore"):
        return bool((values.numpy().astype(np.float16).astype(np.float32) == values.numpy()).all())


def kept_in(primitive: Primitive, dtype: torch.dtype) -> torch.dtype:
    """What the primitive's tensors lie in, in an arena of `dtype`."""
    if isinstance(primitive, LowRank):
        for half in HALVES.values():
            if fits(primitive.a, half) and fits(primitive.b, half):
                return half
    return dtype


def tiles_of(rows: Tensor) -> Tensor:
    """`[out, n]` in tiles of sixteen outputs, number by number."""
    out, n = rows.shape
    tiles = torch.zeros(-(-out // 16), n, 16, dtype=rows.dtype)
    for i in range(out):
        for k in range(n):
            tiles[i // 16, k, i % 16] = rows[i, k]
    return tiles


def sizes_of(primitive: Primitive) -> list[int]:
    """The elements of each of its tensors in memory."""
    if isinstance(primitive, LowRank):
        return [primitive.a.numel(), -(-len(primitive.b) // 16) * 16 * primitive.rank]
    return [tensor.numel() for tensor in tensors_of(primitive)]


def num_bytes_of(program: AdapterProgram, dtype: torch.dtype) -> int:
    return sum(
        -(-size // 64) * 64 * kept_in(p, dtype).itemsize
        for p in program.primitives
        for size in sizes_of(p)
    )


def in_arena(
    program: AdapterProgram,
    dtype: torch.dtype = torch.float32,
    before: int = 3,
    linears: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[BoundAdapter, AdapterArena, int]:
    """The program bound in an arena of bytes after `before` alignments of something else.

    On its way there it was in a file.
    """
    packed = through_a_file(pack(program, dtype))
    assert packed.digest == program.digest
    assert packed.data.dtype == torch.uint8
    assert packed.data.dim() == 1
    assert packed.num_bytes == len(packed.data) == num_bytes_of(program, dtype)
    assert packed.num_bytes == packed_size(program).num_bytes(dtype)
    assert_disjoint([place for _, places in packed.layout for place in places], packed.num_bytes)
    arena = AdapterArena((before + 1) * ALIGNMENT + len(packed.data), torch.uint8)
    arena.data.fill_(7)
    if before:
        assert arena.allocate(before * ALIGNMENT) == 0
    offset = arena.allocate(len(packed.data))
    assert offset == before * ALIGNMENT
    arena.data[offset : offset + len(packed.data)] = packed.data
    return bind(packed.digest, packed.layout, arena.data, offset, linears), arena, offset


def through_a_file(packed: PackedAdapter) -> PackedAdapter:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "packed.safetensors")
        save_packed(packed, "a base", path)
        found = read_packed(path, packed.digest, "a base")
        assert read_packed(path, packed.digest, "another") is None
        assert read_packed(path, "another", "a base") is None
    assert found is not None
    assert torch.equal(found.data, packed.data)
    assert [places for _, places in found.layout] == [places for _, places in packed.layout]
    return found


def assert_disjoint(places: Sequence[Place], num_bytes: int) -> None:
    end = 0
    for offset, shape, dtype in sorted(places, key=lambda place: place.offset):
        assert offset >= end
        assert offset % 64 == 0
        end = offset + shape.numel() * dtype.itemsize
    assert end <= num_bytes


def assert_bound(
    program: AdapterProgram,
    bound: BoundAdapter,
    arena: AdapterArena,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Every tensor of the program is there, as a view of the arena, aligned; and no other."""
    views: list[Tensor] = []
    kept = dtype

    def check(view: Tensor | None, tensor: Tensor) -> None:
        assert view is not None
        assert view.dtype == kept
        assert torch.equal(view, tensor.to(kept))
        assert view.untyped_storage().data_ptr() == arena.data.untyped_storage().data_ptr()
        assert (view.data_ptr() - arena.data.data_ptr()) % 64 == 0
        views.append(view)

    for p in program.primitives:
        kept = kept_in(p, dtype)
        match p:
            case PrefixKV(layer=layer, keys=keys, values=values):
                check(bound.prefix[layer][0], keys)
                check(bound.prefix[layer][1], values)
            case VirtualTokens(rows=rows):
                check(bound.virtual_tokens, rows)
            case LowRank(module=module, a=a, b=b, scale=scale):
                low_rank = bound.modules[module].low_rank
                assert low_rank is not None
                check(low_rank.a, a)
                check(low_rank.b_tiles, tiles_of(b.detach()))
                assert torch.equal(low_rank.a_t, a.T.to(kept))
                assert torch.equal(low_rank.b_t, b.T.to(kept))
                assert (low_rank.out, low_rank.scale) == (len(b), scale)
            case InputScale(module=module, v=v):
                check(bound.modules[module].input_scale, v)
            case OutputScale(module=module, v=v):
                check(bound.modules[module].output_scale, v)
            case BiasDelta(module=module, b=b):
                check(bound.modules[module].bias, b)
            case InputRotation(module=module, blocks=blocks):
                check(bound.modules[module].rotation, blocks)
            case ModuleOverride(module=module, weight=weight, bias=bias):
                override = bound.modules[module].override
                assert override is not None
                check(override[0], weight)
                assert (override[1] is None) == (bias is None)
                if bias is not None:
                    check(override[1], bias)
            case RowOverride(module=module, ids=ids, rows=rows):
                replaced = bound.modules[module].rows
                assert replaced is not None
                assert replaced[0].dtype == torch.int64
                assert tuple(replaced[0].tolist()) == ids
                check(replaced[1], rows)
    found = [v for pair in bound.prefix.values() for v in pair]
    found += [] if bound.virtual_tokens is None else [bound.virtual_tokens]
    for weights in bound.modules.values():
        found += [] if weights.low_rank is None else weights.low_rank[:2]
        found += [] if weights.rows is None else weights.rows[1:]
        single = (
            weights.input_scale, weights.output_scale, weights.bias, weights.rotation,
            *(weights.override or ()),
        )  # fmt: skip
        found += [view for view in single if view is not None]
    assert len(found) == len(views)
    assert list(bound.modules) == program.modules
    assert bound.kernel is None


# -- every tensor where it belongs -------------------------------------------------------------


@pytest.mark.parametrize("name", list(tiny.peft_configs("llama")))
def test_every_method_is_bound_as_it_was(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    bound, arena, offset = in_arena(program)
    assert bound.digest == program.digest
    assert_bound(program, bound, arena)
    assert (arena.data[:offset] == 7).all()
    assert (arena.data[offset + num_bytes_of(program, torch.float32) :] == 7).all()


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_another_dtype_rounds_and_no_more(dtype: torch.dtype, llama_world: World) -> None:
    for name in ("lora-r4", "dora", "ia3", "prefix", "prompt"):
        program = llama_world.saved(name).compile(llama_world.base)
        bound, arena, _ = in_arena(program, dtype)
        assert_bound(program, bound, arena, dtype)


def test_a_layout_holds_no_weights(llama_world: World) -> None:
    """It stays in host memory for every adapter that is known."""
    for name in llama_world.folders:
        program = llama_world.saved(name).compile(llama_world.base)
        for primitive, _ in pack(program, torch.float32).layout:
            assert all(tensor.is_meta for tensor in tensors_of(primitive))


def test_two_adapters_in_one_arena_are_apart(llama_world: World) -> None:
    arena = AdapterArena(1 << 18, torch.uint8)
    bound = []
    programs = [llama_world.saved(n).compile(llama_world.base) for n in ("lora-r4", "dora", "ia3")]
    for program in programs:
        packed = pack(program, torch.float32)
        offset = arena.allocate(len(packed.data))
        assert offset is not None
        arena.data[offset : offset + len(packed.data)] = packed.data
        bound.append(bind(packed.digest, packed.layout, arena.data, offset))
    for program, adapter in zip(programs, bound, strict=True):
        assert_bound(program, adapter, arena)
    arena.check_integrity()


def test_token_ids_are_exact_in_an_arena_of_bfloat16() -> None:
    """No arena holds them: 49151 would be 49152 there."""
    program = of(RowOverride("e", (49151, 3), noise(2, 5)))
    bound, arena, _ = in_arena(program, torch.bfloat16)
    assert_bound(program, bound, arena, torch.bfloat16)
    assert program.num_elements == 10


def test_trained_parameters_leave_no_graph_in_the_arena() -> None:
    a, b = nn.Parameter(noise(2, 3)), nn.Parameter(noise(4, 2))
    program = of(ModuleOverride("m", nn.Parameter(noise(4, 3)), None), LowRank("n", a, b, 1.0))
    bound, arena, _ = in_arena(program)
    assert_bound(program, bound, arena)
    assert not arena.data.requires_grad


SMALL = st.integers(1, 70)


def factors(draw: st.DrawFn, n_in: int, n_out: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of values of some precision; not contiguous: as a method may slice them out."""
    tensors = noise(n_in, rank).T, noise(n_out, 2 * rank)[:, ::2]
    dtypes = st.sampled_from([torch.float32, torch.float32, *HALVES.values()])
    # Of factors by 2⁻²⁰ most are no values of float16.
    small = draw(st.sampled_from([1.0, 2.0**-20]))
    a, b = ((small * t).to(draw(dtypes)).to(torch.float32) for t in tensors)
    return a, b


@st.composite
def primitives(draw: st.DrawFn) -> list[Primitive]:
    found: list[Primitive] = []
    for i in range(draw(st.integers(0, 3))):
        n_in, n_out, rank = draw(SMALL), draw(SMALL), draw(SMALL)
        found.append(LowRank(f"m{i}", *factors(draw, n_in, n_out, rank), 0.5))
        if draw(st.booleans()):
            found.append(InputScale(f"m{i}", noise(n_in)))
        if draw(st.booleans()):
            found.append(OutputScale(f"n{i}", noise(n_out)))
        if draw(st.booleans()):
            found.append(BiasDelta(f"n{i}", noise(2 * n_out)[::2]))
        if draw(st.booleans()):
            found.append(InputRotation(f"m{i}", noise(n_in, 3, 3).transpose(1, 2)))
        if draw(st.booleans()):
            bias = noise(n_out) if draw(st.booleans()) else None
            found.append(ModuleOverride(f"n{i}", noise(n_in, n_out).T, bias))
        if draw(st.booleans()):
            ids = draw(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=9, unique=True))
            found.append(RowOverride(f"r{i}", tuple(ids), noise(len(ids), n_in)))
    n = draw(SMALL)
    for layer in range(draw(st.integers(0, 2))):
        kv = noise(n, 2, 3, 4)
        found.append(PrefixKV(layer, kv[:, 0], kv[:, 1, :, :3]))
    if draw(st.booleans()) or not found:
        found.append(VirtualTokens(noise(n, 5)))
    return draw(st.permutations(found))


@settings(max_examples=60, deadline=None)
@given(
    parts=primitives(),
    before=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_program_is_bound_as_it_was(
    parts: list[Primitive], before: int, dtype: torch.dtype
) -> None:
    program = of(*parts)
    bound, arena, _ = in_arena(program, dtype, before)
    assert_bound(program, bound, arena, dtype)


# -- half precision where it is exact ----------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", ["lora-r4", "lora-r8-all", "lora-r16-rslora", "lora-patterns"])
def test_an_adapter_saved_in_half_precision_takes_half_the_bytes(
    name: str, dtype: torch.dtype, world: World
) -> None:
    saved = world.saved(name)
    assert {tensor.dtype for tensor in saved.tensors.values()} == {torch.float32}
    in_float = pack(saved.compile(world.base), torch.float32)
    half = saved.changed({key: tensor.to(dtype) for key, tensor in saved.tensors.items()})
    program = half.compile(world.base)
    bound, arena, _ = in_arena(program)
    assert_bound(program, bound, arena)
    packed = pack(program, torch.float32)
    assert 2 * packed.num_bytes == in_float.num_bytes
    factors = [weights.low_rank for weights in bound.modules.values()]
    values = {f.dtype for low_rank in factors if low_rank for f in low_rank[:2]}
    # bfloat16's values are float16's as well, but for the smallest and the largest.
    assert values == {torch.float16} if dtype == torch.float16 else values <= set(HALVES.values())
    views = [f for low_rank in factors if low_rank for f in low_rank[:2]]
    total = sum(tensor.double().sum() for tensor in half.tensors.values())
    assert float(sum(view.double().sum() for view in views)) == pytest.approx(float(total))


def test_only_low_rank_updates_are_kept_in_half_precision(llama_world: World) -> None:
    """The others cost little, and the kernels read them as float32."""
    for name in ("dora", "ia3", "norms", "lora-bias-all", "prompt", "lora-tokens"):
        saved = llama_world.saved(name)
        half = saved.changed({key: tensor.half() for key, tensor in saved.tensors.items()})
        for primitive, places in pack(half.compile(llama_world.base), torch.float32).layout:
            expected = torch.float16 if isinstance(primitive, LowRank) else torch.float32
            assert {place.dtype for place in places} == {expected}, type(primitive)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1 + 2.0**-10, torch.float16),
        (1 + 2.0**-11, torch.float32),
        (-65504.0, torch.float16),
        (65536.0, torch.bfloat16),
        (65536.0 + 256.0, torch.float32),
        (2.0**-24, torch.float16),
        (2.0**-25, torch.bfloat16),
        (-(2.0**-25) * (1 + 2.0**-8), torch.float32),
        (-0.0, torch.float16),
        (3.0e38, torch.float32),
    ],
)
@pytest.mark.parametrize("where", ["a", "b"])
def test_one_value_decides(value: float, kept: torch.dtype, where: str) -> None:
    """What neither half precision holds keeps both factors in float32; nothing is rounded."""
    a, b = noise(3, 20).sign(), noise(19, 3).sign()
    (a if where == "a" else b)[1, 2] = value
    program = of(LowRank("m", a, b, 0.5))
    assert kept_in(program.primitives[0], torch.float32) == kept
    bound, arena, _ = in_arena(program)
    assert_bound(program, bound, arena)
    low_rank = bound.modules["m"].low_rank
    assert low_rank is not None
    found = low_rank.a[1, 2] if where == "a" else low_rank.b_t[2, 1]
    assert found.dtype == kept
    assert found.item() == torch.tensor(value).item()
    assert bool(found.signbit()) == (value < 0 or str(value) == "-0.0")
    # 3 · 20 elements are rounded up to 64, 2 tiles of 3 · 16 to 128.
    assert packed_size(program)[:2] == (192, 0 if kept == torch.float32 else 192)


def test_factors_of_two_half_precisions_are_kept_in_float32() -> None:
    """One holds A, the other B: no kernel reads such a pair."""
    a, b = torch.full((2, 8), 1 + 2.0**-10), torch.full((8, 2), 2.0**-30)
    bound, arena, _ = in_arena(of(LowRank("m", a, b, 1.0)))
    assert_bound(of(LowRank("m", a, b, 1.0)), bound, arena)
    low_rank = bound.modules["m"].low_rank
    assert low_rank is not None
    assert low_rank.a.dtype == low_rank.b_tiles.dtype == torch.float32


def test_each_update_has_the_precision_of_its_own_values() -> None:
    small = noise(33, 4).half().float()
    program = of(
        LowRank("half", noise(4, 50).half().float(), small, 1.0),
        LowRank("single", noise(4, 50), small, 1.0),
        OutputScale("half", torch.ones(33)),
        LowRank("brain", torch.full((4, 50), 2.0**-40), noise(33, 4).bfloat16().float(), 1.0),
    )
    bound, arena, _ = in_arena(program)
    assert_bound(program, bound, arena)
    found = {path: w.low_rank.a.dtype for path, w in bound.modules.items() if w.low_rank}
    assert found == {
        "half": torch.float16,
        "single": torch.float32,
        "brain": torch.bfloat16,
    }
    # A: 200 elements → 256, B: 3 tiles of 4 · 16 → 192; the scale: 33 → 64.
    assert packed_size(program)[:2] == (3 * 448 + 64, 2 * 448)
    assert pack(program, torch.float32).num_bytes == 2 * 448 * 2 + (448 + 64) * 4
    assert pack(program, torch.bfloat16).num_bytes == (3 * 448 + 64) * 2


# -- tiles of sixteen outputs ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 70),
    n=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    sliced=st.booleans(),
)
def test_any_matrix_in_tiles_and_back(out: int, n: int, dtype: torch.dtype, sliced: bool) -> None:
    rows = (100 * noise(out, 2 * n)).to(dtype)
    rows = rows[:, ::2] if sliced else rows[:, :n].contiguous()
    tiles = tiled(rows)
    assert tiles.shape == (num_tiles(out), n, 16)
    assert tiles.is_contiguous()
    assert tiles.dtype == dtype
    assert torch.equal(tiles, tiles_of(rows))
    tiles[-1, :, (out - 1) % 16 + 1 :] = 77  # what fills the last tile up is no part of it
    assert torch.equal(untiled(tiles, out), rows)


def test_tiles_are_fresh_memory() -> None:
    rows = noise(16, 1)
    tiled(rows).zero_()
    assert rows.all()


# -- what the kernels do -----------------------------------------------------------------------


def linears_of(base: BaseModel) -> dict[str, tuple[int, int]]:
    return {
        path: (module.in_features, module.out_features)
        for path, module in base.modules.items()
        if isinstance(module.module, nn.Linear | Conv1D)
    }


def acts_at(bound: BoundAdapter, path: str) -> bool:
    """Do the kernels do something there?"""
    if bound.kernel is None:
        return False
    found: bool = kernels().Batch([(0, 1, bound.kernel, 1.0)]).touches(module_id(path))
    return found


def test_ids_of_modules_have_no_gaps() -> None:
    """Kernels keep tables by id: asking anew uses none up."""
    first = module_id("a module of this test")
    for _ in range(3):
        assert module_id("a module of this test") == first
    assert module_id("another module of this test") == first + 1


@pytest.mark.parametrize("name", list(tiny.peft_configs("llama")))
def test_the_kernels_get_what_they_know(name: str, world: World) -> None:
    """Modules with nothing but low-rank updates, scales and biases; the others are as without."""
    assert kernels() is not None, kernels_status()
    program = world.saved(name).compile(world.base)
    linears = linears_of(world.base)
    bound, _, _ = in_arena(program, linears=linears)
    simple = LowRank | InputScale | OutputScale | BiasDelta
    others = {getattr(p, "module", "") for p in program.primitives if not isinstance(p, simple)}
    expected = [path for path in program.modules if path in linears and path not in others]
    assert [path for path in program.modules if acts_at(bound, path)] == expected
    assert (0 if bound.kernel is None else len(bound.kernel)) == len(expected)
    assert list(bound.modules) == [path for path in program.modules if path not in expected]
    whole, _, _ = in_arena(program)
    for path, weights in bound.modules.items():
        assert_same(weights, whole.modules[path])


def assert_same(mine: ModuleWeights, other: ModuleWeights) -> None:
    for name, value in vars(mine).items():
        torch.testing.assert_close(value, vars(other)[name], rtol=0, atol=0, msg=name)


def test_a_module_is_the_kernels_or_not_theirs_at_all() -> None:
    """What changes x or y beyond their knowledge stays together with what they would know."""

    def both(path: str) -> list[Primitive]:
        return [LowRank(path, noise(3, 8), noise(18, 3), 0.5), OutputScale(path, noise(18))]

    bottleneck = Bottleneck(
        "branch", "stream", noise(2, 18), noise(2), noise(18, 2), noise(18), "relu", "sum", "branch"
    )
    program = of(
        *both("mine"), InputScale("mine", noise(8)), BiasDelta("mine", noise(18)),
        OutputScale("scaled", noise(18)),
        *both("rotated"), InputRotation("rotated", noise(2, 4, 4)),
        *both("replaced"), ModuleOverride("replaced", noise(18, 8), None),
        *both("rows"), RowOverride("rows", (3, 17), noise(2, 8)),
        *both("branch"), bottleneck,
        *both("stream"),
        *both("elsewhere"),
    )  # fmt: skip
    paths = [path for path in program.modules if path != "elsewhere"]
    bound, _, _ = in_arena(program, linears=dict.fromkeys(paths, (8, 18)))
    assert [path for path in program.modules if acts_at(bound, path)] == ["mine", "scaled"]
    assert len(bound.kernel) == 2
    assert set(bound.modules) == set(program.modules) - {"mine", "scaled"}
    for path in bound.modules:
        assert bound.modules[path].low_rank is not None
        assert bound.modules[path].output_scale is not None
    assert bound.modules["stream"].is_stream


def test_what_does_not_fit_a_module_is_no_kernels_adapter() -> None:
    """A wrong size would read beyond the arena."""
    program = of(LowRank("m", noise(3, 8), noise(18, 3), 0.5), BiasDelta("m", noise(18)))
    for wrong in ((9, 18), (8, 17), (8, 33)):
        with pytest.raises(ValueError, match=r"^(a|b|bias): "):
            in_arena(program, linears={"m": wrong})
    assert len(in_arena(program, linears={"m": (8, 18)})[0].kernel) == 1
    alone = of(LowRank("m", noise(8, 8), noise(18, 8), 0.5))
    for dtype in (torch.float32, torch.int8):
        packed = pack(alone, dtype)
        with pytest.raises(ValueError, match=r"^m: an update of \[18, 8\] at one of \[17, 8\]$"):
            bind("d", packed.layout, packed.data, 0, {"m": (8, 17)})
        assert len(bind("d", packed.layout, packed.data, 0, {"m": (8, 18)}).kernel) == 1
