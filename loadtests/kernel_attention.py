"""Paged attention against torch: the context gathered, then scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loadtests.contest import (
    Contender,
    Unavailable,
    figures,
    num_copies,
    number,
    percent,
    race,
    relative_error,
    table,
)
from loadtests.machine import Watch
from peftcore.ops.cpu import kernels

#: SmolLM2-135M's heads, and the engine's block size.
_HEADS, _KV_HEADS, _DIM, _BLOCK_SIZE = 9, 3, 64, 16
DTYPES = {"float16": torch.float16, "float32": torch.float32}
OURS, TORCH = "ours", "torch gather + sdpa"


@dataclass(frozen=True)
class Case:
    """Sequences of one length, of which a step computes the rows from `position` on."""

    name: str
    num_sequences: int
    position: int
    num_rows: int

    @property
    def context_len(self) -> int:
        return self.position + self.num_rows

    @property
    def flop(self) -> float:
        """Of the scores and of the values' sums: nothing of what is masked."""
        seen = sum(range(self.position + 1, self.context_len + 1))
        return 4.0 * self.num_sequences * seen * _HEADS * _DIM

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of the keys and values that are attended to, read once."""
        return 2 * self.num_sequences * self.context_len * _KV_HEADS * _DIM * dtype.itemsize


CASES = (
    Case("decode, 16 x 214", 16, 213, 1),
    Case("decode, 1 x 2000", 1, 1999, 1),
    Case("prefill, 512 at 0", 1, 0, 512),
    Case("prefill, 512 at 1500", 1, 1500, 512),
)


class Step:
    """One step's rows, and where their sequences lie: the same for all layers and contenders."""

    def __init__(self, case: Case) -> None:
        g = torch.Generator().manual_seed(0)
        self.case = case
        n, length = case.num_sequences, case.context_len
        blocks = -(-length // _BLOCK_SIZE)
        self.num_blocks = n * blocks
        self.tables = torch.randperm(self.num_blocks, generator=g).view(n, blocks)
        places = torch.arange(length)
        #: `[sequences, context_len]`
        self.slots = self.tables[:, places // _BLOCK_SIZE] * _BLOCK_SIZE + places % _BLOCK_SIZE
        self.own_slots = self.slots[:, case.position :].flatten().contiguous()
        rows = n * case.num_rows
        self.q = torch.randn(rows, _HEADS, _DIM, generator=g)
        self.k, self.v = (torch.randn(rows, _KV_HEADS, _DIM, generator=g) for _ in range(2))
        #: By slot.
        size = self.num_blocks * _BLOCK_SIZE
        self.keys, self.values = (torch.randn(size, _KV_HEADS, _DIM, generator=g) for _ in range(2))

    def exact(self, dtype: torch.dtype) -> Tensor:
        """`[rows, heads, dim]` in float64, over what the cache keeps of keys and values."""
        keys, values = self.keys.clone(), self.values.clone()
        keys[self.own_slots], values[self.own_slots] = self.k, self.v
        k, v = (t.to(dtype).double()[self.slots].transpose(1, 2) for t in (keys, values))
        n = self.case.num_sequences
        q = self.q.view(n, self.case.num_rows, _HEADS, _DIM).transpose(1, 2).double()
        mask = causal(self.case)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(self.q.shape)


def causal(case: Case) -> Tensor:
    """`[num_rows, context_len]`, True where a row sees."""
    return torch.ones(case.num_rows, case.context_len, dtype=torch.bool).tril(case.position)


def run(
    *,
    repeats: int,
    max_seconds: float,
    step: Callable[[], object],
    watch: Watch,
) -> list[dict[str, Any]]:
    """A record for each case, cache dtype and contender: a layer's time."""
    records = []
    for case in CASES:
        rows = Step(case)
        for dtype_name, dtype in DTYPES.items():
            exact = rows.exact(dtype)
            contenders = [
                Contender.make(OURS, partial(_ours, rows, dtype, exact)),
                Contender.make(TORCH, partial(_torch, rows, dtype, exact)),
            ]
            timings = race(contenders, repeats=repeats, max_seconds=max_seconds, watch=watch)
            for c in contenders:
                record: dict[str, Any] = {
                    "section": "attention", "case": case.name, "dtype": dtype_name,
                    "contender": c.name, "note": c.note,
                }  # fmt: skip
                if c.name in timings:
                    record |= figures(timings[c.name], case.flop, c.num_bytes)
                    record["error"] = c.error
                records.append(record)
            step()
    return records


# -- contenders ------------------------------------------------------------------------------------


def _contender(
    name: str, rows: Step, dtype: torch.dtype, exact: Tensor, layers: Sequence[Callable[[], Tensor]]
) -> Contender:
    error = relative_error(layers[0]().view(exact.shape), exact)
    return Contender(name, layers, rows.case.num_bytes(dtype), error)


def _ours(rows: Step, dtype: torch.dtype, exact: Tensor) -> Contender:
    ops = kernels()
    if ops is None:
        raise Unavailable("no kernels")
    case = rows.case
    chunks = [
        (i * case.num_rows, case.num_rows, case.position, i * rows.tables.shape[1])
        for i in range(case.num_sequences)
    ]
    plan = ops.Plan(rows.own_slots, rows.tables.flatten(), chunks, _BLOCK_SIZE)
    blocked = (-1, _BLOCK_SIZE, _KV_HEADS, _DIM)
    keys = rows.keys.to(dtype).view(blocked).permute(0, 2, 3, 1).contiguous()
    values = rows.values.to(dtype).view(blocked).transpose(1, 2).contiguous()

    def layer(keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = ops.attention(
            rows.q, rows.k, rows.v, None, None, keys, values, plan, _DIM**-0.5
        )
        return out

    count = num_copies(case.num_bytes(dtype))
    layers = [partial(layer, keys.clone(), values.clone()) for _ in range(count)]
    return _contender(OURS, rows, dtype, exact, layers)


def _torch(rows: Step, dtype: torch.dtype, exact: Tensor) -> Contender:
    """Over a cache in the order that a gather likes; sequences of one length need no padding."""
    case = rows.case
    n, flat = case.num_sequences, rows.slots.flatten()
    mask = causal(case)

    def layer(keys: Tensor, values: Tensor) -> Tensor:
        keys[rows.own_slots], values[rows.own_slots] = rows.k.to(dtype), rows.v.to(dtype)
        k, v = (
            t.index_select(0, flat).float().view(n, -1, _KV_HEADS, _DIM).transpose(1, 2)
            for t in (keys, values)
        )
        if case.num_rows == 1:  # the heads of one key are its rows: nothing is repeated or masked
            q = rows.q.view(n, _KV_HEADS, -1, _DIM)
            return F.scaled_dot_product_attention(q, k, v)
        q = rows.q.view(n, case.num_rows, _HEADS, _DIM).transpose(1, 2)
        if case.position:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows.q.shape)

    count = num_copies(case.num_bytes(dtype))
    kept = [t.to(dtype) for t in (rows.keys, rows.values)]
    layers = [partial(layer, *(t.clone() for t in kept)) for _ in range(count)]
    return _contender(TORCH, rows, dtype, exact, layers)


# -- tables ----------------------------------------------------------------------------------------


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    lines = []
    for key in dict.fromkeys((r["case"], r["dtype"]) for r in records):
        found = {r["contender"]: r for r in records if (r["case"], r["dtype"]) == key}
        ours, theirs = found[OURS], found[TORCH]
        both = "ms" in ours and "ms" in theirs
        lines.append(
            [
                ", ".join(key), number(ours.get("ms")), number(theirs.get("ms")),
                f"{theirs['ms'] / ours['ms']:.1f}x" if both else "-",
                *(number(ours.get(name)) for name in ("gflops", "read_gb")),
                percent(ours.get("limit_share")), f"{ours.get('error', 0):.0e}",
            ]
        )  # fmt: skip
    titles = ["a layer: ms", OURS, TORCH, "ratio", "GFLOP/s", "GB/s", "limit", "error"]
    yield table(titles, lines)
