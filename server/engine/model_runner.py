"""One step on the device: a batch of chunks becomes one packed forward pass.

Knows tensors, slots and adapters' weights; knows nothing of who waits, or of what a token means.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from peftcore.layers import AdapterBatch, Segment, VirtualRows
from peftcore.packing import BoundAdapter
from server.engine.scheduler import Batch, Chunk
from server.engine.sequence import Sequence
from server.models.context import ChunkRows, ForwardContext, forward_context
from server.models.kv_pool import KVPool
from server.models.loader import LoadedModel


class ModelRunner:
    """Executes batches on a resident model.

    Args:
        resident: gives a pinned adapter's weights by digest.
    """

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, resident: Callable[[str], BoundAdapter]
    ) -> None:
        self.loaded = loaded
        self.pool = pool
        self.resident = resident

    @torch.inference_mode()
    def execute(self, batch: Batch) -> Tensor:
        """Compute the batch; logits `[rows that sample, vocab]`, in the order of its chunks."""
        device = self.loaded.device
        self._write_prefixes(batch)
        tokens, positions, slots, outputs = [], [], [], []
        end = 0
        for chunk in batch.chunks:
            seq = chunk.seq
            tokens.extend(seq.token_ids[chunk.start : chunk.end])
            positions.append(np.arange(chunk.start, chunk.end))
            slots.append(self._slots(seq, chunk.start, chunk.end))
            end += chunk.num_tokens
            if chunk.samples:
                outputs.append(end - 1)
        context = ForwardContext(self.pool, self._tensor(np.concatenate(slots)), self._rows(batch))
        host = self.loaded.host
        host.batch = self._adapter_batch(batch)
        try:
            with forward_context(context):
                output = self.loaded.model(
                    input_ids=torch.tensor([tokens], device=device),
                    position_ids=self._tensor(np.concatenate(positions))[None],
                    use_cache=False,
                    logits_to_keep=torch.tensor(outputs, dtype=torch.long, device=device),
                )
        finally:
            host.batch = AdapterBatch()
        logits: Tensor = output.logits[0]
        return logits

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.loaded.device)

    def _slots(self, seq: Sequence, start: int, end: int) -> np.ndarray:
        """The cache slots of positions [start, end)."""
        size = self.pool.block_size
        positions = np.arange(start, end)
        table = np.asarray(seq.block_table, dtype=np.int64)
        return table[positions // size] * size + positions % size

    def _write_prefixes(self, batch: Batch) -> None:
        """Put given keys and values of virtual positions into the cache."""
        for chunk in batch.chunks:
            start, end = chunk.write_prefix_from, chunk.seq.num_virtual_tokens
            if start is None:
                continue
            slots = self._tensor(self._slots(chunk.seq, start, end))
            adapter = self.resident(chunk.seq.adapters[0].digest)
            for layer, (keys, values) in adapter.prefix.items():
                self.pool.write(layer, slots, keys[start:end], values[start:end])

    def _rows(self, batch: Batch) -> list[ChunkRows]:
        """Which rows are which positions of which blocks."""
        size = self.pool.block_size
        found: list[ChunkRows] = []
        row = 0
        for chunk in batch.chunks:
            table = chunk.seq.block_table[: -(-chunk.end // size)]
            found.append(ChunkRows(row, row + chunk.num_tokens, chunk.start, table))
            row += chunk.num_tokens
        return found

    def _adapter_batch(self, batch: Batch) -> AdapterBatch:
        """Segments of rows with the same adapters, over all rows and over the rows that sample."""
        tokens: list[Segment] = []
        outputs: list[Segment] = []
        virtual: list[VirtualRows] = []
        row = out = 0
        for _, group in groupby(batch.chunks, key=lambda chunk: chunk.seq.cache_seed):
            chunks = list(group)
            num_rows = sum(chunk.num_tokens for chunk in chunks)
            num_outputs = sum(chunk.samples for chunk in chunks)
            for use in chunks[0].seq.adapters:
                adapter = self.resident(use.digest)
                tokens.append(Segment(row, row + num_rows, adapter, use.weight))
                if num_outputs:
                    outputs.append(Segment(out, out + num_outputs, adapter, use.weight))
                if adapter.virtual_tokens is not None:
                    virtual.extend(self._virtual_rows(chunks, row, adapter.virtual_tokens))
            row += num_rows
            out += num_outputs
        return AdapterBatch(tokens, outputs, virtual)

    @staticmethod
    def _virtual_rows(chunks: list[Chunk], row: int, rows: Tensor) -> list[VirtualRows]:
        found = []
        for chunk in chunks:
            end = min(chunk.end, rows.shape[0])
            if chunk.start < end:
                num = end - chunk.start
                found.append(VirtualRows(row, row + num, rows[chunk.start : end]))
            row += chunk.num_tokens
        return found
