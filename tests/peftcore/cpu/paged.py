"""Sequences over a scattered paged cache, and what eager attention makes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops.cpu import kernels
from tests.peftcore.cpu.cases import generator


class Piece(NamedTuple):
    """Positions [start, stop) of a sequence: a decode row, a chunk, or a whole prompt."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    rotary_dim: int = 0  # 0 for none


@dataclass(frozen=True)
class Scores:
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    causal: bool = True


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[rows, heads, dim]`, of which the first `cos.shape[1]` turn (arXiv:2104.09864)."""
    dim = cos.shape[-1]
    turning, still = x[..., :dim], x[..., dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, still], dim=-1)


def eager(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attention as transformers' eager functions write it, in float64.

    Args:
        q: `[n, heads, dim]`, the last n of the positions; k: `[m, kv_heads, dim]`; v likewise.

    Returns:
        `[n, heads, v_dim]`.
    """
    n, m, groups = len(q), len(k), q.shape[1] // k.shape[1]
    k = k.double().transpose(0, 1).repeat_interleave(groups, dim=0)
    v = v.double().transpose(0, 1).repeat_interleave(groups, dim=0)
    logits = q.double().transpose(0, 1) @ k.transpose(1, 2) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    own, seen = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    hidden = seen > own if scores.causal else torch.zeros(n, m, dtype=torch.bool)
    if scores.window is not None:
        hidden |= seen <= own - scores.window
    logits = logits.masked_fill(hidden, -torch.inf)
    if scores.sinks is not None:
        column = scores.sinks.double().view(-1, 1, 1).expand(-1, n, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., :m]
    return (weights @ v).transpose(0, 1)


@dataclass
class World:
    """Random sequences, and a cache whose unwritten places are NaN."""

    shape: Shape
    lengths: Sequence[int]
    block_size: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    queries: list[Tensor] = field(init=False)
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)
    cos: list[Tensor] = field(init=False)
    sin: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        g, s = generator(self.seed), self.shape
        self.queries = [torch.randn(n, s.heads, s.dim, generator=g) for n in self.lengths]
        # Numbers that the cache's dtype holds, so that float64 is to be reached but for rotation.
        keys = [torch.randn(n, s.kv_heads, s.dim, generator=g) for n in self.lengths]
        values = [torch.randn(n, s.kv_heads, s.v_dim, generator=g) for n in self.lengths]
        self.keys = [k.to(self.dtype).float() for k in keys]
        self.values = [v.to(self.dtype).float() for v in values]
        angles = [torch.rand(n, s.rotary_dim // 2, generator=g) * 6 for n in self.lengths]
        self.cos = [torch.cat([a.cos(), a.cos()], dim=-1) for a in angles]
        self.sin = [torch.cat([a.sin(), a.sin()], dim=-1) for a in angles]
        counts = [-(-n // self.block_size) for n in self.lengths]
        scattered = torch.randperm(sum(counts) + 3, generator=g)[: sum(counts)]
        self.tables = list(scattered.split(counts))
        self.num_blocks = sum(counts) + 3
        self.clear()

    def clear(self) -> None:
        s, n, size = self.shape, self.num_blocks, self.block_size
        self.key_cache = torch.full((n, s.kv_heads, s.dim, size), torch.nan, dtype=self.dtype)
        self.value_cache = torch.full((n, s.kv_heads, size, s.v_dim), torch.nan, dtype=self.dtype)

    def slots(self, piece: Piece) -> Tensor:
        positions = torch.arange(piece.start, piece.stop)
        table = self.tables[piece.sequence]
        return table[positions // self.block_size] * self.block_size + positions % self.block_size

    def plan(self, pieces: Sequence[Piece]) -> Any:
        blocks: list[Tensor] = []
        chunks, row = [], 0
        for piece in pieces:
            offset = sum(map(len, blocks))
            chunks.append((row, piece.stop - piece.start, piece.start, offset))
            blocks.append(self.tables[piece.sequence][: -(-piece.stop // self.block_size)])
            row += piece.stop - piece.start
        slots = torch.cat([self.slots(p) for p in pieces])
        return kernels().Plan(slots, torch.cat(blocks), chunks, self.block_size)

    def step(
        self, pieces: Sequence[Piece], scores: Scores, heads_first: bool = True
    ) -> list[Tensor]:
        """One launch over the pieces' rows; each piece's `[rows, heads, v_dim]`.

        heads_first: give `[1, heads, rows, dim]` views as transformers does; else
            `[rows, heads, dim]`.
        """

        def rows(of: Sequence[Tensor]) -> Tensor:
            return torch.cat([of[p.sequence][p.start : p.stop] for p in pieces])

        q, k, v = rows(self.queries), rows(self.keys), rows(self.values)
        if heads_first:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        has_rotary = self.shape.rotary_dim > 0
        out = kernels().attention(
            q, k, v,
            rows(self.cos) if has_rotary else None, rows(self.sin) if has_rotary else None,
            self.key_cache, self.value_cache, self.plan(pieces),
            scores.scale, scores.window, scores.softcap, scores.sinks, scores.causal,
        )  # fmt: skip
        assert out.shape == (1, len(rows(self.queries)), self.shape.heads, self.shape.v_dim)
        return list(out[0].split([p.stop - p.start for p in pieces]))

    def exact(self, piece: Piece, scores: Scores) -> Tensor:
        q, k, v = (of[piece.sequence] for of in (self.queries, self.keys, self.values))
        if self.shape.rotary_dim:
            cos, sin = self.cos[piece.sequence].double(), self.sin[piece.sequence].double()
            q, k = rotated(q.double(), cos, sin), rotated(k.double(), cos, sin)
        return eager(q[piece.start : piece.stop], k[: piece.stop], v[: piece.stop], scores)
