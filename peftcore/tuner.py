"""The base's modules with adapters in training on top: what `PeftModel` puts into a model.

Every part is applied through its primitives, by the segmented operations that serve it, with
gradients. Rows of a batch may belong to different adapters: that is how several are trained in one
batch, and how a mixed batch is computed. Knows modules, parts and rows; nothing of files or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcore.ops.autograd import add, scale
from peftcore.ops.bottleneck import BottleneckPart, post_norm, pre_norm
from peftcore.ops.segments import VectorPart
from peftcore.ops.trained import TrainedPart, adapted
from peftcore.parts import ModulePart, StreamTap
from peftcore.primitives import (
    BiasDelta,
    Bottleneck,
    InputRotation,
    InputScale,
    LowRank,
    OutputScale,
    RowOverride,
)


class Owner(NamedTuple):
    """Units [start, end) of a batch belong to adapter `name`; None: to the base alone.

    A unit is a sequence of a padded batch, or a token of a packed one.
    """

    start: int
    end: int
    name: str | None


@dataclass
class AdapterContext:
    """What the layers of one model share: which adapters act on what.

    Attributes:
        active: the adapters that act, in order, where `owners` does not say.
        enabled: False within `disable_adapter()`.
        owners: who owns which units of the batch being computed; None: all are `active`'s.
        num_units: what `owners` counts: sequences or tokens.
        kept: `owners` and `num_units` of the rows that reach the output embedding, where a batch
            keeps some rows only for it; None: all.
        streams: path of a norm → its input `[rows, dim]`, until the branch behind it ends.
    """

    active: list[str] = field(default_factory=list)
    enabled: bool = True
    owners: Sequence[Owner] | None = None
    num_units: int = 0
    kept: tuple[Sequence[Owner], int] | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)


class Segment(NamedTuple):
    """Rows [start, end) go through `part`."""

    start: int
    end: int
    part: ModulePart


class AdapterLayer(nn.Module):
    """A module of the base with the parts of any number of adapters.

    Attributes:
        base_layer: the module, untouched.
        parts: adapter name → what it does here.
        merged: names whose effect is in the base layer's weights now.
        is_output: the output embedding, which may see fewer rows than the others.
    """

    def __init__(
        self, base_layer: nn.Module, context: AdapterContext, is_output: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_output = is_output
        self.parts = nn.ModuleDict()
        self.merged: list[str] = []
        self._context = context

    @property
    def weight(self) -> Tensor:
        """The base's; some models read it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def part(self, name: str) -> ModulePart | None:
        return cast(ModulePart, self.parts[name]) if name in self.parts else None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: `[..., in]`, or token ids `[...]` for an embedding."""
        whole, segments = self._segments(x)
        taps = [s for s in segments if isinstance(s.part, StreamTap)]
        if taps:
            self._context.streams[taps[0].part.module.path] = x.reshape(-1, x.shape[-1])
            segments = [s for s in segments if s not in taps]
        if not segments:
            return self.base_layer(x, *args, **kwargs)
        if any(s.part.ends_branch for s in segments):
            (stream,) = args
            assert isinstance(stream, Tensor)
            return self._end_branch(x, stream, whole, segments)
        if not whole and x.dim() == 4 and x.shape[2] == self._context.num_units != x.shape[1]:
            # A norm of heads, [1, heads, tokens, head_dim]: tokens must vary slowest.
            return self.forward(x.transpose(1, 2)).transpose(1, 2)
        if any(s.part.own_forward for s in segments):
            if whole:
                (segment,) = segments
                return segment.part(self.base_layer, x, *args, **kwargs)
            return self._piecewise(x, segments)
        return _apply(self.base_layer, x, whole, segments, self._context.streams)

    def _end_branch(
        self, x: Tensor, stream: Tensor, whole: bool, segments: Sequence[Segment]
    ) -> Tensor:
        """Linear map, dropout, sum and norm, on all rows, as the base has them."""
        base: Any = self.base_layer
        h: Tensor = base.dropout(base.dense(x))
        rows = h.numel() // h.shape[-1]
        work = [
            BottleneckPart(*((0, rows) if whole else (start, end)), p, part.dropout)
            for start, end, part in segments
            for p in part.primitives()
            if isinstance(p, Bottleneck)
        ]
        return post_norm(h, stream, base.LayerNorm, work)

    def _segments(self, x: Tensor) -> tuple[bool, list[Segment]]:
        """The parts that act on `x`, and: does each act on all rows?"""
        context = self._context
        if not context.enabled or self.merged:
            return True, []
        if context.owners is None:
            parts = (self.part(name) for name in context.active)
            return True, [Segment(0, 0, part) for part in parts if part is not None]
        rows = x.numel() // self._row_width(x)
        owners, num_units = context.owners, context.num_units
        if self.is_output and context.kept is not None:
            owners, num_units = context.kept
        scale = rows // num_units if num_units else 0
        assert scale * num_units == rows, "the rows of a module are not the batch's"
        segments = []
        for start, end, name in owners:
            part = None if name is None else self.part(name)
            if part is not None:
                segments.append(Segment(start * scale, end * scale, part))
        return False, segments

    def _row_width(self, x: Tensor) -> int:
        return x.shape[-1] if x.is_floating_point() else 1

    def _piecewise(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each segment through its own part's forward, the rows between through the base."""
        width = self._row_width(x)
        lead = x.shape[:-1] if x.is_floating_point() else x.shape
        rows = x.reshape(-1, width) if x.is_floating_point() else x.reshape(-1)
        pieces, end = [], 0
        for segment in [*segments, None]:
            start = segment.start if segment else len(rows)
            if start > end:
                pieces.append(self.base_layer(rows[end:start]))
            if segment:
                end = segment.end
                piece = rows[segment.start : end]
                if segment.part.own_forward:
                    pieces.append(segment.part(self.base_layer, piece))
                else:
                    one = [Segment(0, 0, segment.part)]
                    streams = {
                        path: stream[segment.start : end]
                        for path, stream in self._context.streams.items()
                    }
                    pieces.append(_apply(self.base_layer, piece, True, one, streams))
        return torch.cat(pieces).view(*lead, -1)


def _apply(
    base: nn.Module,
    x: Tensor,
    whole: bool,
    segments: Sequence[Segment],
    streams: dict[str, Tensor],
) -> Tensor:
    """The base's output with the segments' primitives, in the order that `program` states.

    What is read of `streams` is taken out.
    """
    if not x.is_floating_point():
        return _apply_embedding(base, x, whole, segments)
    rows = x.reshape(-1, x.shape[-1])
    by_kind: dict[type, list[Work]] = {}
    for start, end, part in segments:
        start, end = (0, len(rows)) if whole else (start, end)
        for p in part.applied():
            by_kind.setdefault(type(p), []).append(Work(start, end, part, p))

    def work(kind: type) -> Sequence[Work]:
        return by_kind.get(kind, ())

    for start, end, _, p in work(InputRotation):
        rows = _put(rows, start, end, rotate(rows[start:end], p.blocks))
    scales = [VectorPart(start, end, p.v) for start, end, _, p in work(InputScale)]
    if scales:
        rows = _scale(rows.clone(), scales, whole)
    # Two dimensions in, so that what the base returns is no view and can be added to in place.
    changes = _changes(work(LowRank), work(OutputScale), rows)
    y = adapted(base, rows, changes) if changes else base(rows)
    deltas = [VectorPart(start, end, p.b) for start, end, _, p in work(BiasDelta)]
    if deltas:
        y = add(y, deltas)
    for start, end, _, p in work(RowOverride):
        ids = torch.as_tensor(p.ids, device=y.device)
        logits = F.linear(rows[start:end].to(p.rows.dtype), p.rows)
        bias = getattr(base, "bias", None)
        logits = logits if bias is None else logits + bias[ids]
        y = _put(y, start, end, y[start:end].index_copy(1, ids, logits.to(y.dtype)))
    ends = [BottleneckPart(start, end, p, part.dropout) for start, end, part, p in work(Bottleneck)]
    if ends:
        paths = {e.weights.stream for e in ends if e.weights.stream is not None}
        y = pre_norm(y, streams.pop(paths.pop()) if paths else None, ends)
    return y.view(*x.shape[:-1], -1)


def _changes(updates: Sequence[Work], scales: Sequence[Work], rows: Tensor) -> list[TrainedPart]:
    """A part's update and its scale together; `rows` are the module's inputs."""
    found: dict[ModulePart, list[TrainedPart]] = {}
    for start, end, part, p in updates:
        dropout = part.dropout if part.training else None
        own = None if dropout is None else dropout(rows[start:end])
        change = TrainedPart(start, end, p.a, p.b, p.scale, own=own)
        found.setdefault(part, []).append(change)
    for start, end, part, p in scales:
        changes = found.setdefault(part, [TrainedPart(start, end)])
        if changes[-1].v is None and (changes[-1].start, changes[-1].end) == (start, end):
            changes[-1] = changes[-1]._replace(v=p.v)
        else:
            changes.append(TrainedPart(start, end, v=p.v))
    return [change for changes in found.values() for change in changes]


def _scale(x: Tensor, parts: Sequence[VectorPart], whole: bool) -> Tensor:
    """`scale` in place, one part after another where they overlap."""
    for group in [[part] for part in parts] if whole else [parts]:
        if group:
            x = scale(x, group)
    return x


def _apply_embedding(
    base: nn.Module, token_ids: Tensor, whole: bool, segments: Sequence[Segment]
) -> Tensor:
    """As `_apply`, for a module that looks rows up. The padding token's gets no gradient here."""
    padding = getattr(base, "padding_idx", None)
    y = base(token_ids)
    shape, y = y.shape, y.reshape(-1, y.shape[-1])
    flat = token_ids.reshape(-1)
    for segment in segments:
        start, end = (0, len(flat)) if whole else (segment.start, segment.end)
        ids = flat[start:end]
        for p in segment.part.applied():
            old = y[start:end]
            if isinstance(p, LowRank):
                update = F.embedding(ids, p.a.t(), padding) @ p.b.t() * p.scale
                new = old + update * embedding_scale(base)
            elif isinstance(p, RowOverride):
                trained = torch.tensor([[i != padding] for i in p.ids], device=ids.device)
                rows = torch.where(trained, p.rows, p.rows.detach())
                new = override_rows(old, ids, p.ids, rows * embedding_scale(base))
            else:
                raise AssertionError(f"{type(p).__name__} does not act on an embedding")
            y = _put(y, start, end, new)
    return y.view(shape)


class Work(NamedTuple):
    """Rows [start, end) meet `primitive`."""

    start: int
    end: int
    part: ModulePart
    primitive: Any


def _put(rows: Tensor, start: int, end: int, new: Tensor) -> Tensor:
    """`rows` with [start, end) replaced by `new`, in the dtype of `rows`; a copy."""
    new = new.to(rows.dtype)
    if start == 0 and end == len(rows):
        return new
    return torch.cat([rows[:start], new, rows[end:]])


def rotate(rows: Tensor, blocks: Tensor) -> Tensor:
    """x R.  rows: `[n, in]`; blocks: `[num_blocks, b, b]`, the diagonal blocks of R."""
    num_blocks, size, _ = blocks.shape
    split = rows.view(-1, num_blocks, size).to(blocks.dtype)
    return torch.einsum("nkb,kbc->nkc", split, blocks).reshape(rows.shape)


def override_rows(
    y: Tensor, token_ids: Tensor, ids: Sequence[int] | Tensor, rows: Tensor
) -> Tensor:
    """`y` `[n, dim]` with `rows[j]` where `token_ids` `[n]` equals `ids[j]`; a copy."""
    wanted = torch.as_tensor(ids, device=token_ids.device)
    hit = token_ids[:, None] == wanted
    found = hit.any(dim=1)
    return torch.where(found[:, None], rows[hit.int().argmax(dim=1)].to(y.dtype), y)


def embedding_scale(embedding: nn.Module) -> Tensor | float:
    """What the module multiplies its rows with (Gemma's √hidden)."""
    return getattr(embedding, "embed_scale", 1.0)
