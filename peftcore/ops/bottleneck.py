"""Bottlenecks on the rows of a residual branch.

By torch, part after part and with gradients; where none is wanted and Triton computes on the
device, by its kernels, all parts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peftcore.ops import uses_triton

if TYPE_CHECKING:
    from peftcore.primitives import Bottleneck

EPSILON = 1e-5


class BottleneckPart(NamedTuple):
    """Rows [start, end) of a branch go through `weights`; in training through `dropout` too."""

    start: int
    end: int
    weights: Bottleneck
    dropout: nn.Module | None = None


@cache
def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by AdapterHub's name of it.

    Raises:
        KeyError: not one that is known, or one with parameters of its own.
    """
    if name == "leakyrelu":
        return F.leaky_relu
    found: nn.Module = ACT2FN[name]
    if next(found.parameters(), None) is not None:
        raise KeyError(name)
    return found


def pre_norm(y: Tensor, stream: Tensor | None, parts: Sequence[BottleneckPart]) -> Tensor:
    """Bottlenecks on a branch that the model adds to the stream afterwards.

    Semantics: with h = y[i] and r = stream[i] of a row i of a part, `transform`'s t becomes
    y[i] = t if weights.closes, else t − r.

    Args:
        y: `[rows, d]`, the branch's output.
        stream: `[rows, d]`, what the model adds y to; None where no part reads it.
        parts: disjoint.

    Returns:
        y, changed in a copy.
    """
    if _triton_knows(y, parts):
        return _by_triton(
            y.clone(), y, stream, None, [(p, float(p.weights.closes) - 1) for p in parts]
        )
    pieces = []
    for start, end, p, dropout in parts:
        h = y[start:end].to(p.down.dtype)
        r = None if stream is None else stream[start:end].to(p.down.dtype)
        out = transform(p, h, r, None, dropout)
        if not p.closes:
            assert r is not None
            out = out - r
        pieces.append((start, end, out))
    return _spliced(y, pieces)


def post_norm(
    h: Tensor, stream: Tensor, norm: Callable[[Tensor], Tensor], parts: Sequence[BottleneckPart]
) -> Tensor:
    """Bottlenecks between a branch and the norm after it.

    Semantics: a row without a part gives norm(h + r); one of a part gives norm(t + r) if
    weights.closes, else t, with `transform`'s t.

    Args:
        h: `[..., d]`, the branch's output. A part's rows are those of `[rows, d]`.
        stream: as h.
        norm: of all rows at once, as the base computes it.
        parts: disjoint.
    """
    total = h + stream
    normed = None
    if any("normed" in (part.weights.reads, part.weights.keeps) for part in parts):
        normed = _rows(norm(total))
    h_rows, r_rows = _rows(h), _rows(stream)
    if _triton_knows(h, parts):
        given = (h_rows, r_rows, normed)
        total = _by_triton(_rows(total), *given, [(p, 1.0) for p in parts if p.weights.closes])
        y = _rows(norm(total.view(h.shape)))
        rest = [(p, 0.0) for p in parts if not p.weights.closes]
        return _by_triton(y, *given, rest).view(h.shape)
    closed, open_ended = [], []
    for start, end, p, dropout in parts:
        dtype = p.down.dtype
        r = r_rows[start:end].to(dtype)
        u = None if normed is None else normed[start:end].to(dtype)
        out = transform(p, h_rows[start:end].to(dtype), r, u, dropout)
        if p.closes:
            closed.append((start, end, out + r))
        else:
            open_ended.append((start, end, out))
    y = norm(_spliced(_rows(total), closed).view(h.shape))
    return _spliced(_rows(y), open_ended).view(h.shape)


def transform(
    p: Bottleneck, h: Tensor, r: Tensor | None, normed: Tensor | None, dropout: nn.Module | None
) -> Tensor:
    """One bottleneck on rows that are all its own.

    Semantics: x, k = what p.reads and p.keeps name among h, r, h + r and norm(h + r);
    f = up · act(down · N(x) + down_bias) + up_bias, N a norm without weights if p.normalizes;
    t = f + k; or with an after-norm t = LN(f + k) if p.keeps_in_norm, else LN(f) + k.

    Args:
        h, r, normed: `[rows, d]`, those that p needs; in the dtype of p.
        dropout: on f.

    Source: Houlsby et al. 2019 (1902.00751), Pfeiffer et al. 2020 (2005.00247), He et al. 2021
    (2110.04366), as `adapters.methods.modeling` computes them.
    """

    def named(which: str) -> Tensor:
        if which == "normed":
            assert normed is not None
            return normed
        if which == "branch":
            return h
        assert r is not None
        return r if which == "stream" else h + r

    x, kept = named(p.reads), named(p.keeps)
    if p.normalizes:
        x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    inner = activation(p.activation)(F.linear(x, p.down, p.down_bias))
    out = F.linear(inner, p.up, p.up_bias)
    if dropout is not None:
        out = dropout(out)
    if p.norm_weight is None:
        return out + kept
    if p.keeps_in_norm:
        out = out + kept
    out = F.layer_norm(out, out.shape[-1:], p.norm_weight, p.norm_bias, EPSILON)
    return out if p.keeps_in_norm else out + kept


def _triton_knows(x: Tensor, parts: Sequence[BottleneckPart]) -> bool:
    if torch.is_grad_enabled() or not uses_triton(x.device):
        return False
    from peftcore.ops.triton import bottleneck

    return all(
        (part.dropout is None or not part.dropout.training) and bottleneck.knows(part.weights)
        for part in parts
    )


def _by_triton(
    out: Tensor,
    h: Tensor,
    r: Tensor | None,
    normed: Tensor | None,
    work: Sequence[tuple[BottleneckPart, float]],
) -> Tensor:
    """`out`, overwritten: the parts' rows become `transform`'s result and, times a factor, r."""
    from peftcore.ops.triton import bottleneck

    out = out.contiguous()
    segments = [bottleneck.Segment(p.start, p.end, p.weights, factor) for p, factor in work]
    r, normed = (None if t is None else t.contiguous() for t in (r, normed))
    bottleneck.bottlenecks_(out, h.contiguous(), r, normed, segments, EPSILON)
    return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _spliced(rows: Tensor, pieces: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """`rows` with each [start, end) replaced, in the dtype of `rows`; a copy, gradients flow."""
    if not pieces:
        return rows
    found, at = [], 0
    for start, end, new in sorted(pieces, key=lambda piece: piece[0]):
        found += [rows[at:start], new.to(rows.dtype)]
        at = end
    return torch.cat([*found, rows[at:]])
