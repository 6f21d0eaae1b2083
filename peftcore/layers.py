"""The base's modules with the batch's adapters on top.

`attach` replaces the modules that primitives act on by wrappers sharing one `AdapterHost`; before
a forward pass the engine sets the host's batch. A module that no adapter of the batch touches does
what it did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore.base import BaseModel
from peftcore.ops import LowRankPart, VectorPart, select
from peftcore.packing import BoundAdapter


class Segment(NamedTuple):
    """Rows [start, end) of a packed batch use `adapter`, its additive parts times `weight`.

    Segments of a mixture cover the same rows.
    """

    start: int
    end: int
    adapter: BoundAdapter
    weight: float = 1.0


class VirtualRows(NamedTuple):
    """Rows [start, end) of the batch are virtual tokens: their embeddings are `rows`."""

    start: int
    end: int
    rows: Tensor


class AdapterBatch(NamedTuple):
    """The adapters of one forward pass.

    Attributes:
        tokens: segments over the batch's token rows.
        outputs: segments over the rows for which logits are computed.
        virtual: rows whose embeddings are given.
    """

    tokens: Sequence[Segment] = ()
    outputs: Sequence[Segment] = ()
    virtual: Sequence[VirtualRows] = ()


class AdapterHost:
    """What the wrappers of one model share: the batch that is being computed."""

    def __init__(self) -> None:
        self.batch = AdapterBatch()


class AdapterModule(nn.Module):
    """A linear or norm module of the base, with the batch's primitives.

    y = (W (x ⊙ v_in) + b + Σ weight · scale · B (A (x ⊙ v_in))) ⊙ v_out + Σ weight · Δb, per row.
    """

    def __init__(self, base: nn.Module, path: str, host: AdapterHost, is_output: bool) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.is_output = is_output
        self._host = host

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, rows, in]`, or from a model that folds its batch `[rows, in]`; returns the same
        with `out`."""
        batch = self._host.batch
        segments = batch.outputs if self.is_output else batch.tokens
        low_rank: list[LowRankPart] = []
        input_scales: list[VectorPart] = []
        output_scales: list[VectorPart] = []
        biases: list[VectorPart] = []
        for start, end, adapter, weight in segments:
            weights = adapter.modules.get(self.path)
            if weights is None:
                continue
            if weights.low_rank is not None:
                a_t, b_t, scale = weights.low_rank
                low_rank.append(LowRankPart(start, end, a_t, b_t, weight * scale))
            if weights.input_scale is not None:
                input_scales.append(VectorPart(start, end, weights.input_scale))
            if weights.output_scale is not None:
                output_scales.append(VectorPart(start, end, weights.output_scale))
            if weights.bias is not None:
                biases.append(VectorPart(start, end, weights.bias, weight))

        ops = select(x.device)
        if input_scales:
            x = x.clone()
            ops.scale_(_rows(x), input_scales)
        y: Tensor = self.base(x)
        if low_rank:
            ops.add_low_rank_(_rows(y), _rows(x), low_rank)
        if output_scales:
            ops.scale_(_rows(y), output_scales)
        if biases:
            ops.add_(_rows(y), biases)
        return y


def _rows(x: Tensor) -> Tensor:
    """`x` as `[rows, features]`, sharing its memory."""
    return x.view(-1, x.shape[-1])


class AdapterEmbedding(nn.Module):
    """The input embedding, with the batch's virtual tokens in their rows."""

    def __init__(self, base: nn.Module, host: AdapterHost) -> None:
        super().__init__()
        self.base = base
        self._host = host

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: `[1, rows]`; returns `[1, rows, hidden]`."""
        hidden: Tensor = self.base(token_ids)
        for start, end, rows in self._host.batch.virtual:
            hidden[0, start:end] = rows
        return hidden


def attach(model: PreTrainedModel, base: BaseModel) -> AdapterHost:
    """Wrap every module of `model` that a primitive can act on, in place.

    Args:
        model: the model that `base` describes, not wrapped yet.
    """
    host = AdapterHost()
    embedding = model.get_input_embeddings()
    for module in base.modules.values():
        wrapper: nn.Module
        if module.module is embedding:
            wrapper = AdapterEmbedding(embedding, host)
        elif module.is_linear or module.bias() is not None:
            wrapper = AdapterModule(module.module, module.path, host, module.is_output)
        else:
            continue
        parent, _, name = module.path.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapper)
    return host
