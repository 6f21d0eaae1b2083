"""The cache's memory: its size is what `block_bytes` says, and a write goes where it is told."""

from __future__ import annotations

import pytest
import torch

from server.models.kv_pool import KVPool

#: Layers of unlike shapes, one with keys wider than values.
SHAPES = [(2, 8, 8), (4, 12, 6), (1, 16, 16)]


def pool(dtype: torch.dtype = torch.float32, num_blocks: int = 5, block_size: int = 4) -> KVPool:
    return KVPool(
        SHAPES, num_blocks=num_blocks, block_size=block_size, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_block_bytes_is_what_a_block_takes(dtype: torch.dtype, block_size: int) -> None:
    """Settings turn bytes into blocks by it."""
    made = pool(dtype, num_blocks=7, block_size=block_size)
    num_bytes = sum(tensor.nbytes for tensor in (*made.keys, *made.values))
    assert num_bytes == 7 * KVPool.block_bytes(SHAPES, block_size, dtype)


def test_shapes_are_each_layer_s_own() -> None:
    made = pool()
    assert [tuple(k.shape) for k in made.keys] == [(5, 2, 8, 4), (5, 4, 12, 4), (5, 1, 16, 4)]
    assert [tuple(v.shape) for v in made.values] == [(5, 2, 4, 8), (5, 4, 4, 6), (5, 1, 4, 16)]
    assert all(not tensor.any() for tensor in (*made.keys, *made.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_write_changes_its_slots_alone(dtype: torch.dtype) -> None:
    made = pool(dtype)
    slots = torch.tensor([17, 0, 6])
    keys, values = torch.randn(3, 4, 12), torch.randn(3, 4, 6)
    # As attention hands them over: transposed views.
    made.write(1, slots, keys.transpose(0, 1).contiguous().transpose(0, 1), values)
    kept = made.read(1, slots)
    assert torch.equal(kept[0], keys.to(dtype))
    assert torch.equal(kept[1], values.to(dtype))
    assert made.keys[1][4, :, :, 1].equal(keys[0].to(dtype)), "a position is a column of its block"
    assert made.values[1][4, :, 1].equal(values[0].to(dtype))
    others = torch.tensor([s for s in range(20) if s not in slots.tolist()])
    assert not any(tensor.any() for tensor in made.read(1, others))
    for layer in (0, 2):
        assert not made.keys[layer].any()
        assert not made.values[layer].any()


def test_a_second_write_replaces_the_first() -> None:
    made = pool()
    for fill in (1.0, 2.0):
        made.write(0, torch.tensor([3]), torch.full((1, 2, 8), fill), torch.full((1, 2, 8), -fill))
    keys, values = made.read(0, torch.tensor([3]))
    assert (keys == 2).all()
    assert (values == -2).all()
