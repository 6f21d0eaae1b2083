"""Packed, copied to an offset of an arena, bound: every tensor as the file had it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcore.arena import ALIGNMENT, AdapterArena
from peftcore.packing import BoundAdapter, bind, pack, packed_elements
from peftcore.primitives import (
    BiasDelta,
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


def in_arena(
    program: AdapterProgram, dtype: torch.dtype = torch.float32, before: int = 3
) -> tuple[BoundAdapter, AdapterArena, int]:
    """The program bound in an arena after `before` alignments of something else."""
    packed = pack(program, dtype)
    assert packed.digest == program.digest
    assert packed.data.dtype == dtype
    assert len(packed.data) == packed_elements(program)
    assert packed.num_bytes == packed_elements(program) * dtype.itemsize
    arena = AdapterArena((before + 1) * ALIGNMENT + len(packed.data), dtype)
    arena.data.fill_(7)
    if before:
        assert arena.allocate(before * ALIGNMENT) == 0
    offset = arena.allocate(len(packed.data))
    assert offset == before * ALIGNMENT
    arena.data[offset : offset + len(packed.data)] = packed.data
    return bind(packed.digest, packed.layout, arena.data, offset), arena, offset


def assert_bound(program: AdapterProgram, bound: BoundAdapter, arena: AdapterArena) -> None:
    """Every tensor of the program is there, as a view of the arena, aligned; and no other."""
    views: list[Tensor] = []

    def check(view: Tensor | None, tensor: Tensor) -> None:
        assert view is not None
        assert torch.equal(view, tensor.to(arena.data.dtype))
        assert view.untyped_storage().data_ptr() == arena.data.untyped_storage().data_ptr()
        assert view.storage_offset() % ALIGNMENT == 0
        views.append(view)

    for p in program.primitives:
        match p:
            case PrefixKV(layer=layer, keys=keys, values=values):
                check(bound.prefix[layer][0], keys)
                check(bound.prefix[layer][1], values)
            case VirtualTokens(rows=rows):
                check(bound.virtual_tokens, rows)
            case LowRank(module=module, a=a, b=b, scale=scale):
                low_rank = bound.modules[module].low_rank
                assert low_rank is not None
                check(low_rank[0], a.T)
                check(low_rank[1], b.T)
                assert low_rank[2] == scale
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


@pytest.mark.parametrize("name", list(tiny.peft_configs("llama")))
def test_every_method_is_bound_as_it_was(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    bound, arena, offset = in_arena(program)
    assert bound.digest == program.digest
    assert_bound(program, bound, arena)
    assert (arena.data[:offset] == 7).all()
    assert (arena.data[offset + packed_elements(program) :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_rounds_and_no_more(dtype: torch.dtype, llama_world: World) -> None:
    for name in ("lora-r4", "dora", "ia3", "prefix", "prompt"):
        program = llama_world.saved(name).compile(llama_world.base)
        bound, arena, _ = in_arena(program, dtype)
        assert_bound(program, bound, arena)


def test_a_layout_holds_no_weights(llama_world: World) -> None:
    """It stays in host memory for every adapter that is known."""
    for name in llama_world.folders:
        program = llama_world.saved(name).compile(llama_world.base)
        for primitive, _ in pack(program, torch.float32).layout:
            assert all(tensor.is_meta for tensor in tensors_of(primitive))


def test_two_adapters_in_one_arena_are_apart(llama_world: World) -> None:
    arena = AdapterArena(1 << 16, torch.float32)
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
    program = AdapterProgram("d", "ANY", [RowOverride("e", (49151, 3), torch.randn(2, 5))])
    bound, arena, _ = in_arena(program, torch.bfloat16)
    assert_bound(program, bound, arena)
    assert program.num_elements == 10


def test_trained_parameters_leave_no_graph_in_the_arena() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    program = AdapterProgram("d", "ANY", [ModuleOverride("m", weight, None)])
    bound, arena, _ = in_arena(program)
    assert_bound(program, bound, arena)
    assert not arena.data.requires_grad


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


SMALL = st.integers(1, 70)


@st.composite
def primitives(draw: st.DrawFn) -> list[Primitive]:
    found: list[Primitive] = []
    for i in range(draw(st.integers(0, 3))):
        n_in, n_out, rank = draw(SMALL), draw(SMALL), draw(SMALL)
        # Not contiguous: as a method may slice them out of a larger tensor.
        found.append(LowRank(f"m{i}", noise(n_in, rank).T, noise(n_out, 2 * rank)[:, ::2], 0.5))
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
@given(parts=primitives(), before=st.integers(0, 5))
def test_any_program_is_bound_as_it_was(parts: list[Primitive], before: int) -> None:
    program = AdapterProgram("d", "ANY", parts)
    bound, arena, _ = in_arena(program, before=before)
    assert_bound(program, bound, arena)
