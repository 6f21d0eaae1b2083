"""Sequences of several adapters as the rows of one batch `[1, T]`, without padding.

Each sequence's positions count from its own first token, and it attends to nothing but itself and
its adapter's prefix: a row's result does not depend on what else is in the batch, not even where
that is not finite. Knows rows, prompts and attention; nothing of jobs, losses or optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from peftcore.errors import UnsupportedError
from peftcore.model import PeftModel
from peftcore.ops.sequences import MAX_SHORT, attend_short, kernels_attend
from peftcore.parts import Prompt
from peftcore.train.dropout import Draw, own_dropout
from peftcore.train.samples import IGNORED
from peftcore.tuner import Owner

#: Our attention function's name; registered under no mask name, so that models build no mask.
ATTENTION = "polypeft_packed"


@dataclass(frozen=True)
class Sample:
    """One sequence. `labels[i]` is what position i − 1 is to predict, or IGNORED.

    Attributes:
        input_ids, labels: `[len]` int64, on the CPU.
        task_id: under a multitask prompt.
    """

    input_ids: Tensor
    labels: Tensor
    task_id: int | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.labels.shape


@dataclass
class Span:
    """Rows [start, end) of a batch are one sequence of adapter `name`.

    Attributes:
        num_virtual: how many of them, at its start, are its prompt's.
        num_kept: how many of them predict a label.
        prefix: (keys, values) of each layer, `[kv_heads, n, head_dim]`, that it attends to first.
        draw: where its dropout comes from; None without dropout.
    """

    start: int
    end: int
    name: str
    num_virtual: int
    num_kept: int
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None
    draw: Draw | None = None

    def __len__(self) -> int:
        return self.end - self.start


@dataclass
class PackedBatch:
    """Sequences in rows, those of one adapter beside each other.

    Attributes:
        input_ids, position_ids: `[1, T]`; the id at a virtual token's row means nothing.
        spans: one a sequence, in order, without gaps.
        owners: one an adapter, in rows.
        kept: `[K]`, the rows that predict; targets: `[K]`, what.
        kept_owners: as `owners`, in kept rows.
        virtual: per span with virtual tokens their embeddings `[n, hidden]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    spans: list[Span]
    kept: Tensor
    targets: Tensor
    owners: list[Owner] = field(default_factory=list)
    kept_owners: list[Owner] = field(default_factory=list)
    virtual: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[1]


def pack(
    model: PeftModel, samples: Sequence[tuple[str, Sample]], draws: Sequence[Draw | None]
) -> PackedBatch:
    """Put samples into rows.

    Args:
        samples: (adapter, sample), those of one adapter beside each other.
        draws: for each sample where its dropout comes from.
    """
    prompts = _prompts(model, samples, draws)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    kept: list[Tensor] = []
    targets: list[Tensor] = []
    spans: list[Span] = []
    virtual: dict[int, Tensor] = {}
    row = 0
    for i, ((name, sample), draw) in enumerate(zip(samples, draws, strict=True)):
        prompt = prompts[i]
        labels, tokens, first, num_virtual = sample.labels, sample.input_ids, 0, 0
        span = Span(row, row, name, 0, 0, draw=draw)
        if prompt is not None and isinstance(prompt, list):
            span.prefix, first = prompt, prompt[0][0].shape[1]
        elif prompt is not None:
            num_virtual = len(prompt)
            virtual[i] = prompt
            tokens = torch.cat([tokens.new_zeros(num_virtual), tokens])
            labels = torch.cat([labels.new_full((num_virtual,), IGNORED), labels])
        predicting = (labels[1:] != IGNORED).nonzero().flatten()
        span.end, span.num_virtual, span.num_kept = row + len(tokens), num_virtual, len(predicting)
        ids.append(tokens)
        positions.append(torch.arange(first, first + len(tokens)))
        kept.append(predicting + row)
        targets.append(labels[1:][predicting])
        spans.append(span)
        row = span.end
    device = model.device
    batch = PackedBatch(
        torch.cat(ids)[None].to(device),
        torch.cat(positions)[None].to(device),
        spans,
        torch.cat(kept).to(device),
        torch.cat(targets).to(device),
        virtual=virtual,
    )
    batch.owners = _owners(spans, [len(s) for s in spans])
    batch.kept_owners = _owners(spans, [s.num_kept for s in spans])
    return batch


def _owners(spans: Sequence[Span], lengths: Sequence[int]) -> list[Owner]:
    owners: list[Owner] = []
    end = 0
    for span, length in zip(spans, lengths, strict=True):
        start, end = end, end + length
        if owners and owners[-1].name == span.name:
            owners[-1] = owners[-1]._replace(end=end)
        else:
            assert all(o.name != span.name for o in owners), "an adapter's samples lie apart"
            owners.append(Owner(start, end, span.name))
    return owners


def _prompts(
    model: PeftModel, samples: Sequence[tuple[str, Sample]], draws: Sequence[Draw | None]
) -> list[Tensor | list[tuple[Tensor, Tensor]] | None]:
    """For each sample: rows `[n, hidden]`, or each layer's keys and values, or None.

    An encoder runs once an adapter: its gradient is that of all the adapter's samples together.
    """
    made: dict[tuple[str, int | None], Any] = {}
    for (name, sample), draw in zip(samples, draws, strict=True):
        key = (name, sample.task_id)
        if key in made:
            continue
        prompt = cast(Prompt, model.prompt_encoder[name]) if name in model.prompt_encoder else None
        if prompt is None:
            made[key] = None
        elif prompt.is_kv:
            kv = prompt.kv()
            made[key] = [tuple(layer.unbind(0)) for layer in kv.unbind(0)]
        else:
            task = sample.task_id
            tasks = None if task is None else torch.tensor([task], device=model.device)
            with draw.global_stream() if draw is not None else nullcontext():
                rows = prompt.rows(tasks)
            made[key] = rows[0] if rows.dim() == 3 else rows
    return [made[name, sample.task_id] for name, sample in samples]


def logits_of(model: PeftModel, batch: PackedBatch) -> Tensor:
    """The logits of the rows that predict, `[K, vocab]`, float32.

    To be called within `computing(model, batch)`.
    """
    base = model.get_base_model()
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.virtual:
        inputs = {"inputs_embeds": _embed(base, batch)}
    keeps = _keeps_logits(base)
    if keeps:
        inputs["logits_to_keep"] = batch.kept
    outputs = base(
        **inputs,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        spans=batch.spans,
    )
    logits: Tensor = outputs.logits[0]
    return (logits if keeps else logits[batch.kept]).to(torch.float32)


@contextmanager
def computing(model: PeftModel, batch: PackedBatch) -> Iterator[None]:
    """Within, the model computes `batch`: its rows' adapters, dropout and attention.

    Both passes lie within it, for gradient checkpointing computes again in the backward pass.
    """
    base = model.get_base_model()
    kept = (batch.kept_owners, len(batch.kept)) if _keeps_logits(base) else None
    with (
        packed_attention(base),
        own_dropout(model, batch.spans),
        model.owned_by(batch.owners, batch.num_rows, kept),
    ):
        yield


def _keeps_logits(base: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _embed(base: PreTrainedModel, batch: PackedBatch) -> Tensor:
    rows = base.get_input_embeddings()(batch.input_ids)[0]
    pieces = []
    for i, (span, piece) in enumerate(
        zip(batch.spans, rows.split([len(s) for s in batch.spans]), strict=True)
    ):
        if i in batch.virtual:
            pieces += [batch.virtual[i].to(rows.dtype), piece[span.num_virtual :]]
        else:
            pieces.append(piece)
    return torch.cat(pieces)[None]


#: The configs of a base and of its parts that say how it attends.
_configs: WeakKeyDictionary[PreTrainedModel, list[Any]] = WeakKeyDictionary()


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends by `attend`."""
    configs = _configs.get(model)
    if configs is None:
        found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        configs = [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]
        _configs[model] = configs
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    spans: Sequence[Span] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every row to its own sequence, and to its prefix before that.

    A sequence at a time, or the short ones in one call: a mask over all rows would cost T² and,
    where one sequence's values are not finite, make the others' so too (0 · NaN). How a sequence is
    computed depends on nothing but itself.

    Args:
        module: the attention layer; `layer_idx` picks the prefix's layer.
        query: `[1, heads, T, head_dim]`, rotated.
        key: `[1, kv_heads, T, head_dim]`, rotated; value: `[1, kv_heads, T, v_head_dim]`.
        attention_mask: not used.
        scaling: factor of the scores, 1/√head_dim by default.
        sliding_window: a row sees this many positions, its own and its prefix's included.
        softcap: scores become softcap · tanh(scores / softcap).
        s_aux: per head a logit that takes probability and has no value (attention sinks).
        spans: the sequences.

    Returns:
        `[1, T, heads, v_head_dim]`, and None for the weights.
    """
    if spans is None:
        raise UnsupportedError(
            "model", f"{type(module).__name__} does not hand on what its attention is told"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = query.dtype
    together = None
    if softcap is None and s_aux is None and kernels_attend(query, key, value):
        short = [(s.start, s.end) for s in spans if _is_short(s, dropout, sliding_window)]
        if short:
            together = attend_short(query, key, value, short, scale)
        if together is not None and len(short) == len(spans):
            return together, None
    if query.device.type == "cpu":  # whose half-precision kernels are slower than float32's
        query, key, value = query.float(), key.float(), value.float()
    lengths = [len(s) for s in spans]
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = []
    for span, q, k, v in zip(
        spans,
        query.split(lengths, dim=2),
        key.split(lengths, dim=2),
        value.split(lengths, dim=2),
        strict=True,
    ):
        if together is not None and _is_short(span, dropout, sliding_window):
            out.append(together[:, span.start : span.end])
            continue
        if span.prefix is not None:
            keys, values = span.prefix[layer]
            k = torch.cat([keys[None].to(k.dtype), k], dim=2)
            v = torch.cat([values[None].to(v.dtype), v], dim=2)
        drop = dropout if span.draw is not None else 0.0
        if softcap is None and s_aux is None and drop == 0:
            mask = _mask(len(span), k.shape[2], sliding_window, q.device)
            one = F.scaled_dot_product_attention(
                q, k, v, mask, scale=scale, is_causal=mask is None and len(span) > 1,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        else:
            one = _explicit(q, k, v, scale, sliding_window, softcap, s_aux, drop, span.draw, layer)
        out.append(one.transpose(1, 2).to(dtype))
    return torch.cat(out, dim=1), None


def _is_short(span: Span, dropout: float, window: int | None) -> bool:
    """May it go through `attend_short`?"""
    plain = span.prefix is None and (span.draw is None or dropout == 0)
    return plain and len(span) <= MAX_SHORT and (window is None or len(span) <= window)


def _mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[n, m]`, True where the i-th of n rows, the last of m positions, may see; None: causal."""
    if n == m and (window is None or m <= window):
        return None
    q = torch.arange(m - n, m, device=device)[:, None]
    k = torch.arange(m, device=device)[None, :]
    mask = k <= q
    return mask if window is None else mask & (k > q - window)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    draw: Draw | None,
    layer: int,
) -> Tensor:
    """Attention with what torch's own lacks: soft caps, sinks, dropout of one's own stream."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n, m = scores.shape[-2:]
    mask = _mask(n, m, window, q.device)
    if mask is None:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :m]
    if draw is not None and dropout > 0:
        weights = weights * draw.mask(weights.shape, dropout, ("attention", layer), q.device)
    return weights @ v


AttentionInterface.register(ATTENTION, attend)


#: Bases that `check_packing` has found to do.
_checked: WeakSet[PreTrainedModel] = WeakSet()


@torch.no_grad()
def check_packing(model: PeftModel) -> None:
    """Does the base compute packed sequences as it computes each alone?

    Raises UnsupportedError: rows of one sequence reach another's, as in recurrent or convolving
    layers, or the base is no causal language model.
    """
    base = model.get_base_model()
    if base in _checked:
        return
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        raise UnsupportedError("model", f"{type(base).__name__} is no causal language model")
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedError("model", f"{type(base).__name__} takes no position_ids")
    vocab = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocab, (n,), generator=generator) for n in (7, 5)]
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            batch = pack(model, [(_PROBE, Sample(i, i)) for i in ids], [None, None])
            with computing(model, batch):
                got = logits_of(model, batch)
            alone = [base(input_ids=i[None].to(model.device)).logits[0, :-1] for i in ids]
    finally:
        model.train(was_training)
    expected = torch.cat(alone).to(torch.float32)
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= tolerance:
        raise UnsupportedError(
            "model",
            f"{type(base).__name__} computes packed sequences otherwise than each alone "
            f"(relative error {error:.2g}): train its adapters one after another",
        )
    _checked.add(base)


#: The owner of the rows of `check_packing`: no adapter.
_PROBE = "__probe__"
