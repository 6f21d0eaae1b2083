"""One step on the device: a batch of chunks becomes one packed forward pass.

Knows tensors, slots and adapters' weights; knows nothing of who waits, or of what a token means.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from peftcore.layers import AdapterBatch, Segment, VirtualRows
from peftcore.packing import BoundAdapter
from peftcore.upload import upload
from server.engine.pooling import Pooler
from server.engine.scheduler import Batch, Chunk
from server.engine.step_graphs import StepGraphs
from server.engine.step_inputs import StepInputs, chunk_rows, slots_of
from server.models.context import ForwardContext, forward_context
from server.models.kv_pool import KVPool
from server.models.loader import LoadedModel


class ModelRunner:
    """Executes batches on a resident model.

    Args:
        resident: gives a pinned adapter's weights by digest.
        graphs: compute the steps that they can; None where there are none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pool: KVPool,
        resident: Callable[[str], BoundAdapter],
        graphs: StepGraphs | None = None,
    ) -> None:
        self.loaded = loaded
        self.pool = pool
        self.resident = resident
        self.graphs = graphs
        self.pooler = Pooler(loaded, resident)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> Tensor:
        """Compute the batch; logits `[rows, vocab]` of each chunk's last `num_outputs` rows, which
        the next step may overwrite.

        Sequences that are pooled get their part into `Sequence.pooled`.
        """
        adapters = self._adapter_batch(batch)
        if self.graphs is not None:
            replayed = self.graphs.execute(batch, adapters)
            if replayed is not None:
                return replayed
        self._write_prefixes(batch)
        hidden: Tensor | None
        rows = StepInputs.of(batch, self.pool.block_size, self.loaded.device)
        context = ForwardContext(
            self.pool,
            rows.slots,
            chunk_rows(batch, self.pool.block_size),
            causal=not self.loaded.is_encoder,
        )
        host = self.loaded.host
        host.batch = adapters
        inputs = {"input_ids": rows.token_ids[None], "position_ids": rows.positions[None]}
        try:
            with forward_context(context):
                if self.loaded.is_encoder:
                    logits, hidden = self._encode(batch, inputs)
                else:
                    logits, hidden = self._decode(batch, inputs, rows.outputs)
        finally:
            host.batch = AdapterBatch()
        if hidden is not None:
            self.pooler.pool(batch, hidden)
        return logits

    def _decode(
        self, batch: Batch, inputs: dict[str, Tensor], outputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the rows `outputs`; hidden states `[rows, hidden]` where some are pooled."""
        found: list[Tensor] = []
        model, hook = self.loaded.model, None
        if any(chunk.seq.pooling is not None for chunk in batch.chunks):
            hook = model.base_model.register_forward_hook(
                lambda module, args, result: found.append(result.last_hidden_state[0])
            )
        try:
            logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=outputs).logits[0]
        finally:
            if hook is not None:
                hook.remove()
        return logits, found[0] if found else None

    def _encode(self, batch: Batch, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `_decode`: no logits, and all hidden states."""
        inputs["position_ids"] += self.loaded.position_offset
        if any(chunk.seq.token_type_ids is not None for chunk in batch.chunks):
            types: list[int] = []
            for chunk in batch.chunks:
                own = chunk.seq.token_type_ids or [0] * len(chunk.seq.prompt_token_ids)
                types.extend([*[0] * chunk.seq.num_virtual_tokens, *own][chunk.start : chunk.end])
            inputs["token_type_ids"] = upload([types], torch.long, self.loaded.device)
        hidden: Tensor = self.loaded.model(**inputs).last_hidden_state[0]
        return hidden.new_empty(0, 0), hidden

    def _write_prefixes(self, batch: Batch) -> None:
        """Put given keys and values of virtual positions into the cache."""
        for chunk in batch.chunks:
            start, end = chunk.write_prefix_from, chunk.seq.num_virtual_tokens
            if start is None:
                continue
            own = slots_of(chunk.seq, start, end, self.pool.block_size)
            slots = upload(own, torch.long, self.loaded.device)
            adapter = self.resident(chunk.seq.adapters[0].digest)
            for layer, (keys, values) in adapter.prefix.items():
                self.pool.write(layer, slots, keys[start:end], values[start:end])

    def _adapter_batch(self, batch: Batch) -> AdapterBatch:
        """Segments of rows with the same adapters, over all rows and over those with logits."""
        tokens: list[Segment] = []
        outputs: list[Segment] = []
        virtual: list[VirtualRows] = []
        row = out = 0
        for _, group in groupby(batch.chunks, key=lambda chunk: chunk.seq.cache_seed):
            chunks = list(group)
            num_rows = sum(chunk.num_tokens for chunk in chunks)
            num_outputs = sum(chunk.num_outputs for chunk in chunks)
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
