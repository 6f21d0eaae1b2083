"""Paged attention as transformers' attention function: writes the step's keys and values, attends.

Registered under `NAME` and under no mask name, so that models build no mask. The reference that
tests and the start-up probe compare with is transformers' own eager attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from server.models.context import DecodeRows, ForwardContext, PromptRows, current_context

NAME = "polypeft_paged"


def paged_attention(
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every row to its own sequence's cached positions.

    Args:
        module: the attention layer; `layer_idx` picks the cache layer.
        query: `[1, heads, rows, head_dim]`, rotated.
        key: `[1, kv_heads, rows, head_dim]`, rotated; value: `[1, kv_heads, rows, v_head_dim]`.
        attention_mask: not used; positions come from the context.
        scaling: factor of the scores, 1/√head_dim by default.
        sliding_window: a row sees this many positions, its own included.
        softcap: scores become softcap · tanh(scores / softcap).
        s_aux: per head a logit that takes probability and has no value (attention sinks).

    Returns:
        `[1, rows, heads, v_head_dim]`, and None for the weights.
    """
    context = current_context()
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = query.new_zeros(query.shape[2], query.shape[1], values.shape[2])
    context.pool.write(layer, context.slots, keys, values)
    pool_keys, pool_values = context.pool.keys[layer], context.pool.values[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[0].transpose(0, 1)
    for i, rows in enumerate(context.prompts):
        k = pool_keys.index_select(0, rows.context_slots).to(query.dtype)
        v = pool_values.index_select(0, rows.context_slots).to(query.dtype)
        out[rows.start : rows.end] = _attend_prompt(
            queries[rows.start : rows.end],
            k,
            v,
            scale,
            softcap,
            s_aux,
            _prompt_mask(context, i, rows, sliding_window),
        )
    for i, group in enumerate(context.decodes):
        flat = group.context_slots.flatten()
        k = pool_keys.index_select(0, flat).to(query.dtype)
        v = pool_values.index_select(0, flat).to(query.dtype)
        n, length = group.context_slots.shape
        out[group.rows] = _attend_decode(
            queries[group.rows],
            k.view(n, length, *k.shape[1:]),
            v.view(n, length, *v.shape[1:]),
            scale,
            softcap,
            s_aux,
            _decode_mask(context, i, group, sliding_window),
        )
    return out.unsqueeze(0), None


def _prompt_mask(context: ForwardContext, i: int, rows: PromptRows, window: int | None) -> Tensor:
    """`[n, context_len]`, True where row i may see the position; made once a step."""
    mask = context.masks.get((i, window))
    if mask is None:
        device = rows.context_slots.device
        q = rows.position + torch.arange(rows.end - rows.start, device=device)[:, None]
        k = torch.arange(rows.context_slots.shape[0], device=device)[None, :]
        mask = k <= q
        if window is not None:
            mask &= k > q - window
        context.masks[(i, window)] = mask
    return mask


def _decode_mask(context: ForwardContext, i: int, group: DecodeRows, window: int | None) -> Tensor:
    """`[n, max_context_len]`, True where the sequence may see the position; made once a step."""
    index = (len(context.prompts) + i, window)
    mask = context.masks.get(index)
    if mask is None:
        k = torch.arange(group.context_slots.shape[1], device=group.rows.device)[None, :]
        lens = group.context_lens[:, None]
        mask = k < lens
        if window is not None:
            mask &= k >= lens - window
        context.masks[index] = mask
    return mask


def _attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """q: `[n, heads, d]`, k: `[context, kv_heads, d]`, mask `[n, context]` → `[n, heads, dv]`."""
    groups = q.shape[1] // k.shape[1]
    k = k.transpose(0, 1).repeat_interleave(groups, dim=0)
    v = v.transpose(0, 1).repeat_interleave(groups, dim=0)
    out = _attention(q.transpose(0, 1)[None], k[None], v[None], mask, scale, softcap, sinks)
    return out[0].transpose(0, 1)


def _attend_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """q: `[n, heads, d]`, k: `[n, context, kv_heads, d]`, mask `[n, context]` → `[n, heads, dv]`.

    The query heads of one key-value head attend as if they were rows: nothing is repeated.
    """
    n, heads, d = q.shape
    kv_heads = k.shape[2]
    grouped = q.view(n, kv_heads, heads // kv_heads, d)
    if sinks is not None:
        sinks = sinks.view(1, kv_heads, heads // kv_heads)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = _attention(grouped, k, v, mask[:, None, None, :], scale, softcap, sinks)
    return out.reshape(n, heads, -1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Batched attention, q: `[b, h, n, d]`, k: `[b, h, m, d]`, mask broadcasts to `[b, h, n, m]`.

    sinks: `[h]` for rows of one head each, or `[1, h, n]` where the rows are heads.
    """
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        per_row = sinks.view(1, -1, 1) if sinks.dim() == 1 else sinks
        column = per_row.to(scores.dtype).expand(*scores.shape[:-1]).unsqueeze(-1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return torch.matmul(weights[..., : k.shape[-2]], v)


AttentionInterface.register(NAME, paged_attention)
