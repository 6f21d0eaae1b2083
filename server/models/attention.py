"""Paged attention as transformers' attention function: writes the step's keys and values, attends.

Registered under `NAME` and under no mask name, so that models build no mask. The CPU kernels attend
where they can, Triton's on a GPU that it compiles for, else torch; under `TORCH_NAME` torch alone.
The reference that tests and the start-up probe compare with is transformers' own eager attention.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from peftcore.ops import select, uses_triton
from peftcore.ops.cpu import kernels
from peftcore.upload import upload
from server.models.context import ChunkRows, ForwardContext, current_context
from server.models.kv_pool import KVPool

NAME = "polypeft_paged"
TORCH_NAME = "polypeft_paged_torch"


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
    torch_alone: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every row to its own sequence's cached positions.

    Args:
        module: the attention layer; `layer_idx` picks the cache layer.
        query: `[1, heads, rows, head_dim]`, rotated.
        key: `[1, kv_heads, rows, head_dim]`, rotated; value: `[1, kv_heads, rows, v_head_dim]`.
        attention_mask: not used; positions come from the context.
        scaling: factor of the scores, 1/√head_dim by default.
        sliding_window: a row sees this many positions, its own included.
        softcap: scores become softcap · tanh(scores / softcap).
        s_aux: per head a logit that takes probability and has no value (attention sinks).
        torch_alone: without kernels, for a model that they do not serve right.

    Returns:
        `[1, rows, heads, v_head_dim]`, and None for the weights.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = Scores(scale, sliding_window, softcap, s_aux)
    if not torch_alone and uses_triton(query.device):
        return _attend_by_triton(layer, query, key, value, how), None
    if not torch_alone and has_kernels(current_context().pool, query):
        return attend(layer, query, key, value, how), None
    return _attend_by_torch(layer, query, key, value, how), None


class Scores(NamedTuple):
    """How scores are made; `sinks` `[heads]`. The rest as for `paged_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def has_kernels(pool: KVPool, query: Tensor) -> bool:
    """Do the CPU kernels attend for these dtypes?"""
    kept = pool.keys[0].dtype in (torch.float32, torch.float16)
    return query.is_cpu and query.dtype == torch.float32 and kept and bool(select(query.device))


def attend(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: Scores,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write and attend by the kernels.

    Args:
        query, key, value: `[1, heads, rows, dim]`, or `[rows, heads, dim]`; float32.
        rotary: cos and sin `[1, rows, dim]` that queries and keys are still to be rotated by.

    Returns:
        `[1, rows, heads, v_head_dim]`.
    """
    context = current_context()
    plan = plan_of(context)
    cos, sin = rotary or (None, None)
    out: Tensor = kernels().attention(
        query,
        key,
        value,
        cos,
        sin,
        context.pool.keys[layer],
        context.pool.values[layer],
        plan,
        how.scale,
        how.window,
        how.softcap,
        how.sinks,
        context.causal,
    )
    return out


def plan_of(context: ForwardContext) -> Any:
    """The step's places in the cache as the kernels know them, the same for all layers."""
    plan = context.shared.get("plan")
    if plan is None:
        blocks: list[int] = []
        chunks = []
        for start, end, position, table in context.chunks:
            chunks.append((start, end - start, position, len(blocks)))
            blocks.extend(table)
        plan = kernels().Plan(context.slots, torch.tensor(blocks), chunks, context.pool.block_size)
        context.shared["plan"] = plan
    return plan


def _attend_by_triton(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
    from peftcore.ops.triton import attention as kernel  # imports triton

    context = current_context()
    plan = context.shared.get("plan")
    if plan is None:
        plan = context.shared["plan"] = kernel.Plan.of(context.chunks, query.device)
    keys, values = context.pool.keys[layer], context.pool.values[layer]
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    kernel.write(context.slots, rows[1], rows[2], keys, values)
    out = kernel.attend(plan, rows[0], keys, values, kernel.Scores(*how, causal=context.causal))
    return out.unsqueeze(0)


# -- by torch ------------------------------------------------------------------------------------


class _PromptRows(NamedTuple):
    """A chunk of several rows; context_slots: those of its positions from 0, `[context_len]`."""

    start: int
    end: int
    position: int
    context_slots: Tensor


class _DecodeRows(NamedTuple):
    """One row each of several sequences of like length.

    rows: `[n]`, their places in the batch. context_lens: `[n]`. context_slots: `[n,
    max_context_len]`; behind a sequence's own comes its first again: attention reads what it masks,
    and a NaN in another sequence's slot would spread.
    """

    rows: Tensor
    context_slots: Tensor
    context_lens: Tensor


def _attend_by_torch(layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
    context = current_context()
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = query.new_zeros(query.shape[2], query.shape[1], values.shape[2])
    context.pool.write(layer, context.slots, keys, values)
    queries = query[0].transpose(0, 1)
    rows = context.shared.get("rows")
    if rows is None:
        rows = context.shared["rows"] = _rows(context)
    for group in rows:
        if isinstance(group, _PromptRows):
            k, v = _context(context, layer, group.context_slots, query.dtype)
            mask = _mask(context, group, how.window)
            own = slice(group.start, group.end)
            out[own] = _attend_prompt(queries[own], k, v, how, mask)
        else:
            flat = group.context_slots.flatten()
            k, v = _context(context, layer, flat, query.dtype)
            n, length = group.context_slots.shape
            k, v = k.view(n, length, *k.shape[1:]), v.view(n, length, *v.shape[1:])
            mask = _mask(context, group, how.window)
            out[group.rows] = _attend_decode(queries[group.rows], k, v, how, mask)
    return out.unsqueeze(0)


def _context(
    context: ForwardContext, layer: int, slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    keys, values = context.pool.read(layer, slots)
    return keys.to(dtype), values.to(dtype)


def _rows(context: ForwardContext) -> list[_PromptRows | _DecodeRows]:
    """Which rows attend alone (chunks), and which together (single rows, by like length)."""
    found: list[_PromptRows | _DecodeRows] = []
    singles: dict[int, list[ChunkRows]] = defaultdict(list)
    for chunk in context.chunks:
        if chunk.end - chunk.start == 1:
            # Lengths within a factor of two share a padded table.
            singles[chunk.context_len.bit_length()].append(chunk)
        else:
            slots = _context_slots(context, chunk)
            found.append(_PromptRows(chunk.start, chunk.end, chunk.position, slots))
    device = context.slots.device
    for group in singles.values():
        own = [_context_slots(context, chunk) for chunk in group]
        longest = max(len(s) for s in own)
        padded = torch.stack([torch.cat([s, s[:1].expand(longest - len(s))]) for s in own])
        lens = upload([len(s) for s in own], torch.int64, device)
        rows = upload([chunk.start for chunk in group], torch.int64, device)
        found.append(_DecodeRows(rows, padded, lens))
    return found


def _context_slots(context: ForwardContext, chunk: ChunkRows) -> Tensor:
    """The slots of the chunk's positions from 0, `[context_len]`."""
    size, device = context.pool.block_size, context.slots.device
    table = upload(chunk.block_table, torch.int64, device)[:, None] * size
    slots = (table + torch.arange(size, device=device)).flatten()
    return slots[: chunk.context_len]


def _mask(context: ForwardContext, group: _PromptRows | _DecodeRows, window: int | None) -> Tensor:
    """`[n, context_len]`, True where a row may see the position; made once a step."""
    name = (id(group), window)
    mask = context.shared.get(name)
    if mask is None:
        places = torch.arange(group.context_slots.shape[-1], device=context.slots.device)[None, :]
        if isinstance(group, _PromptRows):
            count = group.end - group.start
            last = group.position + torch.arange(count, device=places.device)[:, None]
        else:
            last = group.context_lens[:, None] - 1
        mask = places <= last if context.causal else torch.ones_like(places, dtype=torch.bool)
        if window is not None:
            mask &= places > last - window
        context.shared[name] = mask
    found: Tensor = mask
    return found


def _attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Scores,
    mask: Tensor,
) -> Tensor:
    """q: `[n, heads, d]`, k: `[context, kv_heads, d]`, mask `[n, context]` → `[n, heads, dv]`."""
    groups = q.shape[1] // k.shape[1]
    k = k.transpose(0, 1).repeat_interleave(groups, dim=0)
    v = v.transpose(0, 1).repeat_interleave(groups, dim=0)
    out = _attention(q.transpose(0, 1)[None], k[None], v[None], mask, how)
    return out[0].transpose(0, 1)


def _attend_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Scores,
    mask: Tensor,
) -> Tensor:
    """q: `[n, heads, d]`, k: `[n, context, kv_heads, d]`, mask `[n, context]` → `[n, heads, dv]`.

    The query heads of one key-value head attend as if they were rows: nothing is repeated.
    """
    n, heads, d = q.shape
    kv_heads = k.shape[2]
    grouped = q.view(n, kv_heads, heads // kv_heads, d)
    if how.sinks is not None:
        how = how._replace(sinks=how.sinks.view(1, kv_heads, heads // kv_heads))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = _attention(grouped, k, v, mask[:, None, None, :], how)
    return out.reshape(n, heads, -1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    how: Scores,
) -> Tensor:
    """Batched attention, q: `[b, h, n, d]`, k: `[b, h, m, d]`, mask broadcasts to `[b, h, n, m]`.

    how.sinks: `[h]` for rows of one head each, or `[1, h, n]` where the rows are heads.
    """
    scale, _, softcap, sinks = how
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
AttentionInterface.register(TORCH_NAME, partial(paged_attention, torch_alone=True))
