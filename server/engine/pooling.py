"""From hidden states to what pooled sequences give: embeddings, probabilities of classes.

Knows hidden states, adapters' heads and which rows are whose; nothing of how they were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from peftcore.layers import AdapterBatch, Segment
from peftcore.packing import BoundAdapter
from peftcore.tasks import CLASSIFICATION
from server.engine.scheduler import Batch, Chunk
from server.engine.sequence import Sequence as Request
from server.models.loader import LoadedModel


class Pooler:
    """Pools the sequences of a batch that ask for it.

    Args:
        resident: gives a pinned adapter's weights by digest.
    """

    def __init__(self, loaded: LoadedModel, resident: Callable[[str], BoundAdapter]) -> None:
        self._loaded = loaded
        self._resident = resident

    def pool(self, batch: Batch, hidden: Tensor) -> None:
        """Take the step's hidden states `[rows, hidden]` into `Sequence.pooled`.

        A sequence whose last chunk this was has its result there afterwards, float32: `[hidden]`,
        `[labels]`, or `[tokens, labels]`.
        """
        row = 0
        complete: dict[str, list[Request]] = {task: [] for task in CLASSIFICATION}
        for chunk in batch.chunks:
            seq, end = chunk.seq, row + chunk.num_tokens
            if seq.pooling is not None:
                self._take(chunk, hidden[row:end])
                if chunk.completes and seq.pooling.kind in complete:
                    complete[seq.pooling.kind].append(seq)
            row = end
        for task, sequences in complete.items():
            if sequences:
                self._classify(task, sequences)

    def _take(self, chunk: Chunk, rows: Tensor) -> None:
        """What the chunk's rows `[num_tokens, hidden]` add. A head's inputs are kept for it."""
        seq = chunk.seq
        assert seq.pooling is not None
        kind = seq.pooling.kind
        own = rows[max(0, seq.num_virtual_tokens - chunk.start) :]
        if kind == "TOKEN_CLS":
            seq.pooled = own.clone() if seq.pooled is None else torch.cat([seq.pooled, own])
        elif kind == "mean":
            total = own.float().sum(dim=0)
            seq.pooled = total if seq.pooled is None else seq.pooled + total
        elif kind == "cls":
            if seq.pooled is None and len(own):
                seq.pooled = own[0].to(torch.float32, copy=True)  # not the step's memory
        elif chunk.completes:  # last, and what a SEQ_CLS head reads
            row = self._loaded.tasks.task_class(kind).row if kind == "SEQ_CLS" else -1
            seq.pooled = rows[row].clone()
        if chunk.completes and kind not in CLASSIFICATION:
            vector = seq.pooled.float()
            if kind == "mean":
                vector = vector / len(seq.prompt_token_ids)
            if seq.pooling.normalize:
                vector = torch.nn.functional.normalize(vector, dim=0)
            seq.pooled = vector

    def _classify(self, task: str, sequences: Sequence[Request]) -> None:
        """From the heads' inputs to probabilities; those of one adapter stand together."""
        cls = self._loaded.tasks.task_class(task)
        inputs = torch.stack([s.pooled for s in sequences]) if task == "SEQ_CLS" else None
        pooled = (
            self._pooled(sequences, inputs) if cls.reads_pooler and inputs is not None else None
        )
        start = 0
        for digest, group in groupby(sequences, key=lambda seq: seq.adapters[0].digest):
            own = list(group)
            head = self._head(digest, cls.head_paths)
            if inputs is None:
                logits = cls.logits(head, torch.cat([s.pooled for s in own])[None])[0]
                parts = list(logits.split([len(s.pooled) for s in own]))
            else:
                end = start + len(own)
                given = None if pooled is None else pooled[start:end]
                parts = list(cls.logits(head, inputs[start:end, None], given))
                start = end
            for seq, part in zip(own, parts, strict=True):
                assert seq.pooling is not None
                seq.pooled = _probabilities(part.float(), seq.pooling.problem_type)

    def _pooled(self, sequences: Sequence[Request], rows: Tensor) -> Tensor:
        """The pooler's `[n, hidden]`, under each sequence's adapter."""
        pooler, host = self._loaded.pooler, self._loaded.host
        assert pooler is not None
        segments, start = [], 0
        for digest, group in groupby(sequences, key=lambda seq: seq.adapters[0].digest):
            end = start + len(list(group))
            segments.append(Segment(start, end, self._resident(digest)))
            start = end
        host.batch = AdapterBatch(outputs=segments)
        try:
            pooled: Tensor = pooler(rows[:, None])
        finally:
            host.batch = AdapterBatch()
        return pooled

    def _head(self, digest: str, paths: Sequence[str]) -> dict[str, Tensor]:
        modules = self._resident(digest).modules
        head: dict[str, Tensor] = {}
        for path in paths:
            override = modules[path].override
            assert override is not None  # admission saw to it
            weight, bias = override
            head[f"{path}.weight"] = weight
            if bias is not None:
                head[f"{path}.bias"] = bias
        return head


def _probabilities(logits: Tensor, problem_type: str | None) -> Tensor:
    """What transformers' pipelines make of `[..., labels]`."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-1)
