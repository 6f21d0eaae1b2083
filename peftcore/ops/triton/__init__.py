"""Adapters' segmented operations by Triton, on a GPU; on a CPU in Triton's interpreter.

Every segment is computed at its own rank: a batch's rows are cut into blocks of 16, their updates
into items of 16 ranks, and each program computes one, so that one hot adapter and a thousand cold
ones load the machine alike. The inputs of a shrink are split by their number alone (not by the
batch), and everything is summed in one order: a row's result does not depend on its neighbours.

Segmented shrink and expand: Punica (Chen et al. 2023, arXiv:2310.18547), S-LoRA (Sheng et al. 2023,
arXiv:2311.03285); here without a common rank, without gathered weights, and for several modules at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peftcore.ops.triton.kernels import expand_kernel, scale_kernel, shrink_kernel
from peftcore.ops.triton.tables import RANKS, ROWS, Adapter, Batch, Capacity, block_of
from peftcore.ops.triton.trained import adapt_, adapt_back_

#: Inputs of one program of a shrink: a wider module's are split.
_SPLIT = 1024
#: Inputs of a step of a shrink, and outputs of one program of an expand, at most.
_STEP = 128
_COLUMNS = 128
#: Modules of one launch.
_MODULES = 3


def linear(x: Tensor, weights: Sequence[Any], ids: Sequence[int], batch: Batch) -> list[Tensor]:
    """See `peftcore.ops.Kernels`.  weights: modules, which compute their own maps."""
    if any(batch.scales(id) for id in ids):
        results = []
        for module, id in zip(weights, ids, strict=True):
            scaled = scale_input(x, id, batch)
            results.append(module(scaled).contiguous())
            add_adapters_(results[-1], scaled, id, batch)
        return results
    results = [module(x).contiguous() for module in weights]
    add_to_all_(results, x, ids, batch)
    return results


def add_adapters_(y: Tensor, x: Tensor, id: int, batch: Batch) -> None:
    """See `peftcore.ops.Kernels`."""
    add_to_all_([y], x, [id], batch)


def add_to_all_(ys: Sequence[Tensor], x: Tensor, ids: Sequence[int], batch: Batch) -> None:
    """`add_adapters_` at several modules that read the same x, in one launch for three of them.

    Args:
        ys: `[..., out]` each, contiguous, of one dtype, changed in place.
        x: `[..., in]`, scaled already.
        ids: the modules' ids; one at which the batch does nothing costs nothing.
    """
    width = x.shape[-1]
    x = x.contiguous()
    found = []
    for y, id in zip(ys, ids, strict=True):
        if not y.is_contiguous() or y.numel() * width != x.numel() * y.shape[-1]:
            raise ValueError(f"y: {tuple(y.shape)} of x: {tuple(x.shape)}")
        batch.check(id, width, y.shape[-1], x.numel() // width)
        if batch.acts(id):
            found.append((y, id))
    columns = block_of(max(y.shape[-1] for y in ys), _COLUMNS)
    for start in range(0, len(found), _MODULES):
        _launch(found[start : start + _MODULES], x, batch, columns)


def _launch(found: Sequence[tuple[Tensor, int]], x: Tensor, batch: Batch, columns: int) -> None:
    num_blocks, num_items = batch.capacity.blocks, batch.capacity.items
    width = x.shape[-1]
    splits = triton.cdiv(width, _SPLIT)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # halves are exact in tf32
    padded = [*found, *[found[-1]] * (_MODULES - len(found))]
    ids = [id for _, id in padded]
    outs = [y.shape[-1] for y, _ in padded]
    shape = (len(found) * splits * num_items, ROWS, RANKS)
    shrunk = torch.empty(shape, dtype=torch.float32, device=x.device)
    if num_items:
        shrink_kernel[(num_items, len(found) * splits)](
            x, batch.segments, batch.items, shrunk, *ids, num_items, width,
            SPLITS=splits, SPLIT=_SPLIT, STEP=block_of(width, _STEP), PRECISION=precision,
        )  # fmt: skip
    ends, total = [], 0
    for out in outs[: len(found)]:
        total += triton.cdiv(out, columns)
        ends.append(total)
    ends += [total] * (_MODULES - len(found))
    if num_blocks:
        expand_kernel[(num_blocks, total)](
            *(y for y, _ in padded), batch.segments, batch.blocks, batch.entries, shrunk,
            *ids, *outs, *ends[:2], num_items,
            SPLITS=splits, COLUMNS=columns, ALIGNED=all(out % 16 == 0 for out in outs),
            PRECISION=precision,
        )  # fmt: skip


def scale_input(x: Tensor, id: int, batch: Batch) -> Tensor:
    """See `peftcore.ops.Kernels`."""
    if not batch.scales(id):
        return x
    width = x.shape[-1]
    batch.check(id, width, None, x.numel() // width)
    x = x.clone(memory_format=torch.contiguous_format)
    columns = block_of(width, _COLUMNS)
    if batch.capacity.blocks:
        scale_kernel[(batch.capacity.blocks, triton.cdiv(width, columns))](
            x, batch.segments, batch.blocks, batch.entries, id, width, COLUMNS=columns
        )
    return x


__all__ = [
    "Adapter",
    "Batch",
    "Capacity",
    "adapt_",
    "adapt_back_",
    "add_adapters_",
    "add_to_all_",
    "linear",
    "scale_input",
]
