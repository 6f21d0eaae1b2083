"""A step's numbers: which tokens stand at which positions, go into which slots, and are answered.

Made on the host in one buffer, and copied to the device at once. Knows chunks and block tables,
nothing of models or adapters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peftcore.upload import staging, to_device
from server.engine.scheduler import Batch
from server.engine.sequence import Sequence
from server.models.context import ChunkRows


class StepInputs(NamedTuple):
    """Views of one int64 buffer.

    token_ids, positions, slots: `[rows]`; a slot is where the row's keys and values go. outputs:
    the rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, batch: Batch, block_size: int, device: torch.device) -> StepInputs:
        """The rows of all chunks, one chunk after another."""
        num_rows = sum(chunk.num_tokens for chunk in batch.chunks)
        num_outputs = sum(chunk.num_outputs for chunk in batch.chunks)
        sizes = [num_rows, num_rows, num_rows, num_outputs]
        host = staging(sum(sizes), torch.int64, device)
        write_rows(batch, block_size, host[: 3 * num_rows].view(3, num_rows))
        outputs = host[3 * num_rows :].numpy()
        row = out = 0
        for chunk in batch.chunks:
            row, n = row + chunk.num_tokens, chunk.num_outputs
            outputs[out : out + n] = np.arange(row - n, row)
            out += n
        return cls(*to_device(host, device).split(sizes))


def write_rows(batch: Batch, block_size: int, out: Tensor) -> None:
    """Token ids, positions and slots of the batch's rows, into `[3, rows]` of host memory."""
    ids, positions, slots = out.numpy()
    row = 0
    for chunk in batch.chunks:
        seq, start = chunk.seq, chunk.start
        if chunk.num_tokens == 1:  # most are: nothing is made for them
            ids[row], positions[row] = seq.token_ids[start], start
            block, place = divmod(start, block_size)
            slots[row] = seq.block_table[block] * block_size + place
            row += 1
            continue
        end = row + chunk.num_tokens
        ids[row:end] = seq.token_ids[start : chunk.end]
        positions[row:end] = np.arange(start, chunk.end)
        slots[row:end] = slots_of(seq, start, chunk.end, block_size)
        row = end


def slots_of(seq: Sequence, start: int, end: int, block_size: int) -> np.ndarray:
    """The cache slots of positions [start, end)."""
    positions = np.arange(start, end)
    table = np.asarray(seq.block_table, dtype=np.int64)
    slots: np.ndarray = table[positions // block_size] * block_size + positions % block_size
    return slots


def chunk_rows(batch: Batch, block_size: int) -> list[ChunkRows]:
    """Which rows are which positions of which blocks."""
    found: list[ChunkRows] = []
    row = 0
    for chunk in batch.chunks:
        table = chunk.seq.block_table[: -(-chunk.end // block_size)]
        found.append(ChunkRows(row, row + chunk.num_tokens, chunk.start, table))
        row += chunk.num_tokens
    return found


__all__ = ["StepInputs", "chunk_rows", "slots_of", "write_rows"]
