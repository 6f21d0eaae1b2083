"""Does the paged attention serve this model right? Asked of the model itself at start.

No flag of transformers tells: some architectures never call the attention function, or call it with
something missing, and answer nonsense. So a short ragged batch, chunked over scattered blocks, is
compared with the model's own eager attention, and a model that differs is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.models.attention import NAME
from server.models.context import DecodeRows, ForwardContext, PromptRows, forward_context
from server.models.kv_pool import KVPool

_LENGTHS = (9, 22, 37)
_BLOCK_SIZE = 4
#: Allowed difference of logits, in standard deviations of the eager ones.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
#: Rotary embeddings that depend on the longest position of the whole batch.
_BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}


class UnservableModel(ValueError):
    """The model cannot be served; the message says why."""


def check_config(model: PreTrainedModel) -> None:
    """Refuse what a forward pass would not show.

    Raises:
        UnservableModel: rotary embeddings that make one request's result depend on another's.
    """
    bad = _rope_types(model.config.to_dict()) & _BATCH_DEPENDENT_ROPE
    if bad:
        raise UnservableModel(
            f"{type(model).__name__}: rope type {sorted(bad)[0]!r} depends on the longest sequence "
            "of the batch, so requests would change each other's results"
        )


def _rope_types(config: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                found.add(value)
            found |= _rope_types(value)
    return found


@torch.inference_mode()
def measure_kv_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Per layer (num_kv_heads, head_dim, v_head_dim), as they reach the attention function.

    Raises:
        UnservableModel: a layer does not call the attention function, or more than once.
    """
    device = model.device
    context = ForwardContext(pool=None, slots=torch.arange(2, device=device))
    with forward_context(context):
        _forward(model, torch.zeros(2, dtype=torch.long, device=device), torch.arange(2))
    num_layers = model.config.get_text_config().num_hidden_layers
    if context.layers_seen != dict.fromkeys(range(num_layers), 1):
        raise UnservableModel(
            f"{type(model).__name__}: of {num_layers} layers, {len(context.layers_seen)} call "
            "transformers' attention interface (each should, once): its cache cannot be paged"
        )
    return [context.kv_shapes[i] for i in range(num_layers)]


@torch.inference_mode()
def probe(model: PreTrainedModel, kv_shapes: list[tuple[int, int, int]]) -> None:
    """Compare a ragged, chunked, paged batch with eager attention.

    Raises:
        UnservableModel: the logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompts = [torch.randint(0, vocab, (n,), generator=generator) for n in _LENGTHS]
    model.set_attn_implementation("eager")
    try:
        expected = [model(p[None].to(model.device), use_cache=False).logits[0] for p in prompts]
    finally:
        model.set_attn_implementation(NAME)
    actual = _paged_logits(model, kv_shapes, prompts)
    for want, got in zip(expected, actual, strict=True):
        difference = float((want.float() - got.float()).abs().max() / want.float().std())
        if not difference <= _TOLERANCE[want.dtype]:
            raise UnservableModel(
                f"{type(model).__name__}: paged attention differs from eager attention by "
                f"{difference:.2g} standard deviations of the logits: it would answer wrongly"
            )


def _paged_logits(
    model: PreTrainedModel, kv_shapes: list[tuple[int, int, int]], prompts: list[Tensor]
) -> list[Tensor]:
    """Logits of every position: most of each prompt in a first step, then a chunk, then one row."""
    num_blocks = sum(-(-n // _BLOCK_SIZE) for n in _LENGTHS)
    pool = KVPool(
        kv_shapes,
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        dtype=model.dtype,
        device=model.device,
    )
    # Sequences take blocks in turn from the end: scattered and interleaved.
    free = list(range(num_blocks))
    slots = []
    for n in _LENGTHS:
        blocks = [free.pop(-1 if i % 2 else 0) for i in range(-(-n // _BLOCK_SIZE))]
        table = torch.tensor(blocks)[:, None] * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE)
        slots.append(table.flatten()[:n])
    results: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step in (
        [max(1, n // 2) for n in _LENGTHS],
        [n - n // 2 - 1 for n in _LENGTHS],
        [1] * len(prompts),
    ):
        rows, chunks, start = [], [], 0
        for i, n in enumerate(step):
            rows.append(torch.arange(done[i], done[i] + n))
            context_slots = slots[i][: done[i] + n].to(model.device)
            chunks.append(PromptRows(start, start + n, done[i], context_slots))
            start += n
        decodes = []
        if step[0] == 1:
            lens = torch.tensor([len(c.context_slots) for c in chunks])
            padded = torch.nn.utils.rnn.pad_sequence(
                [c.context_slots for c in chunks], batch_first=True
            )
            decodes = [
                DecodeRows(torch.arange(start, device=model.device), padded, lens.to(model.device))
            ]
            chunks = []
        context = ForwardContext(
            pool=pool,
            slots=torch.cat([s[r] for s, r in zip(slots, rows, strict=True)]).to(model.device),
            prompts=chunks,
            decodes=decodes,
        )
        tokens = torch.cat([p[r] for p, r in zip(prompts, rows, strict=True)]).to(model.device)
        with forward_context(context):
            logits = _forward(model, tokens, torch.cat(rows))
        for i, part in enumerate(logits.split(step)):
            results[i].append(part)
            done[i] += step[i]
    return [torch.cat(parts) for parts in results]


def _forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits `[rows, vocab]` of a packed batch."""
    output = model(
        input_ids=tokens[None],
        position_ids=positions[None].to(model.device),
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits
