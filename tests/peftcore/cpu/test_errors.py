"""What does not fit raises and says what; nothing that Python can pass ends the process.

Each call runs in this process: one that reads past its tensors' ends shows as a crash of pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.ops.cpu import kernels

Call = Callable[[Any], Any]

LONG = torch.long


def int8(out: int = 20, in_: int = 8, bias: Tensor | None = None) -> Any:
    tiles = max(0, -(-out // 16))
    codes = torch.zeros(tiles, max(-(-in_ // 4), 0), 16, 4, dtype=torch.int8)
    return kernels().Weight(codes, torch.ones(tiles, 16), bias, out, in_)


def nf4(*scales: int, tiles: int = 2, out: int = 20, in_: int = 16) -> Any:
    codes = torch.zeros(tiles, 2, 16, 4, dtype=torch.uint8)
    return kernels().Weight(codes, torch.ones(scales), None, out, in_)


def adapter(id_: int = 0, in_: int = 8, out: int = 20, **given: Any) -> Any:
    made = kernels().Adapter()
    made.set(id_, in_, out, **given)
    return made


def low_rank(in_: int = 8, out: int = 20, rank: int = 2) -> dict[str, Any]:
    return {"a": torch.zeros(rank, in_), "b": torch.zeros(-(-out // 16), rank, 16)}


def codes(in_: int = 8, out: int = 20, rank: int = 2) -> dict[str, Any]:
    a = torch.zeros(1, -(-in_ // 4), 16, 4, dtype=torch.int8)
    b = torch.zeros(-(-out // 16), -(-rank // 4), 16, 4, dtype=torch.int8)
    return {"a": a, "b": b, "scales": torch.ones(1, 16)}


def updated(
    id_: int = 0, in_: int = 8, rank: int = 2, dtype: torch.dtype = torch.float32, **at: int
) -> Any:
    """Of 20 outputs, in a buffer of 1024 bytes: a at 0, b, of 256 bytes, at 64, or as given."""
    made = kernels().Adapter()
    where = {"a": 0, "b": 64, "scales": -1} | at
    made.set_low_rank(
        torch.zeros(1024, dtype=torch.uint8),
        [(id_, in_, 20, rank, dtype, 1.0, where["a"], where["b"], where["scales"])],
    )
    return made


def batch(made: Any, start: int = 0, end: int = 3) -> Any:
    return kernels().Batch([(start, end, made, 1.0)])


X = torch.zeros(3, 8)

WEIGHTS: dict[str, Call] = {
    "float codes": lambda k: k.Weight(torch.zeros(2, 2, 16, 4), torch.ones(2, 16), None, 20, 8),
    "codes of another size": lambda k: k.Weight(
        torch.zeros(2, 3, 16, 4, dtype=torch.int8), torch.ones(2, 16), None, 20, 8
    ),
    "codes that lie apart": lambda k: k.Weight(
        torch.zeros(2, 2, 4, 16, dtype=torch.int8).transpose(2, 3), torch.ones(2, 16), None, 20, 8
    ),
    "half scales": lambda k: k.Weight(
        torch.zeros(2, 2, 16, 4, dtype=torch.int8), torch.ones(2, 16).half(), None, 20, 8
    ),
    "scales of one tile": lambda k: k.Weight(
        torch.zeros(2, 2, 16, 4, dtype=torch.int8), torch.ones(16), None, 20, 8
    ),
    "activations of twelve bits": lambda k: k.Weight(
        torch.zeros(2, 2, 16, 4, dtype=torch.int8), torch.ones(2, 16), None, 20, 8, 12
    ),
    "nf4 of an odd size": lambda k: nf4(2, 1, 16, in_=17),
    "nf4 of half an eight": lambda k: nf4(2, 1, 16, in_=20),
    "nf4 without scales": lambda k: nf4(0),
    "nf4 with scales of three groups": lambda k: nf4(2, 3, 16),
    "nf4 with a scale for four inputs": lambda k: nf4(2, 4, 16),
    "a bias of another size": lambda k: int8(bias=torch.zeros(19)),
    "a double bias": lambda k: int8(bias=torch.zeros(20).double()),
    "no outputs": lambda k: int8(out=0),
    "no outputs of nf4": lambda k: nf4(0, tiles=0, out=0),
    "no inputs": lambda k: int8(in_=0),
    "negative outputs": lambda k: int8(out=-5),
    "negative inputs": lambda k: int8(in_=-8),
}

ADAPTERS: dict[str, Call] = {
    "a without b": lambda k: adapter(a=torch.zeros(2, 8)),
    "b without a": lambda k: adapter(b=torch.zeros(2, 2, 16)),
    "a of another size": lambda k: adapter(a=torch.zeros(2, 7), b=torch.zeros(2, 2, 16)),
    "a of one dimension": lambda k: adapter(a=torch.zeros(16), b=torch.zeros(2, 2, 16)),
    "a transposed": lambda k: adapter(a=torch.zeros(8, 2).T, b=torch.zeros(2, 2, 16)),
    "b of one tile": lambda k: adapter(a=torch.zeros(2, 8), b=torch.zeros(1, 2, 16)),
    "b of another rank": lambda k: adapter(a=torch.zeros(2, 8), b=torch.zeros(2, 3, 16)),
    "double factors": lambda k: adapter(
        a=torch.zeros(2, 8).double(), b=torch.zeros(2, 2, 16).double()
    ),
    "factors of two dtypes": lambda k: adapter(a=torch.zeros(2, 8).half(), b=torch.zeros(2, 2, 16)),
    "codes without scales": lambda k: adapter(**codes() | {"scales": None}),
    "scales without codes": lambda k: adapter(**low_rank(), scales=torch.ones(1, 16)),
    "scales alone": lambda k: adapter(scales=torch.ones(1, 16)),
    "scales of two tiles": lambda k: adapter(**codes() | {"scales": torch.ones(2, 16)}),
    "codes in rows": lambda k: adapter(**codes() | {"a": torch.zeros(2, 8, dtype=torch.int8)}),
    "codes of A beside halves of B": lambda k: adapter(
        **codes() | {"b": torch.zeros(2, 2, 16).half()}
    ),
    "codes of B beside halves of A": lambda k: adapter(
        **low_rank() | {"b": torch.zeros(2, 2, 16, dtype=torch.int8)}
    ),
    "codes of B in rows": lambda k: adapter(
        **codes() | {"b": torch.zeros(2, 4, 16, dtype=torch.int8)}
    ),
    "codes of B of one tile": lambda k: adapter(
        **codes() | {"b": torch.zeros(1, 1, 16, 4, dtype=torch.int8)}
    ),
    "codes of B of rank 0": lambda k: adapter(
        **codes() | {"b": torch.zeros(2, 0, 16, 4, dtype=torch.int8)}
    ),
    "an input scale of another size": lambda k: adapter(in_scale=torch.ones(20)),
    "a half output scale": lambda k: adapter(out_scale=torch.ones(20).half()),
    "a bias that lies apart": lambda k: adapter(bias=torch.zeros(40)[::2]),
    "an update beyond the buffer's end": lambda k: updated(b=832),
    "an update before its start": lambda k: updated(a=-64),
    "an update between two lines": lambda k: updated(a=4),
    "an update larger than the buffer": lambda k: updated(in_=1 << 62),
    "an update of sizes with a small product": lambda k: updated(in_=1 << 32, rank=1 << 32),
    "an update of no rank": lambda k: updated(rank=0),
    "an update in doubles": lambda k: updated(dtype=torch.float64),
    "an update of codes without scales": lambda k: updated(dtype=torch.int8),
    "an update of a module below all": lambda k: updated(id_=-1),
    "updates in a buffer of floats": lambda k: k.Adapter().set_low_rank(torch.zeros(64), []),
    "a negative start": lambda k: batch(adapter(), -1, 2),
    "an end before the start": lambda k: batch(adapter(), 2, 1),
    "no adapter": lambda k: batch(None),
}

LAUNCHES: dict[str, Call] = {
    "no weights": lambda k: k.linear(X, [], []),
    "no module id": lambda k: k.linear(X, [int8()], []),
    "no weight at all": lambda k: k.linear(X, [None], [0]),
    "half rows": lambda k: k.linear(X.half(), [int8()], [0]),
    "rows of another size": lambda k: k.linear(torch.zeros(3, 9), [int8()], [0]),
    "a number": lambda k: k.linear(torch.tensor(1.0), [int8()], [0]),
    "weights of two sizes": lambda k: k.linear(X, [int8(), int8(in_=10)], [0, 1]),
    "a segment beyond the rows": lambda k: k.linear(X, [int8()], [0], batch(adapter(), 0, 4)),
    "an empty segment beyond the rows": lambda k: k.linear(
        X, [int8()], [0], batch(adapter(), 4, 4)
    ),
    "an adapter for more inputs": lambda k: k.linear(
        X, [int8()], [0], batch(adapter(in_=4000, **low_rank(in_=4000)))
    ),
    "an adapter for more outputs": lambda k: k.linear(
        X, [int8(out=4000)], [0], batch(adapter(**low_rank()))
    ),
    "an adapter for fewer outputs in the same tiles": lambda k: k.linear(
        X, [int8()], [0], batch(adapter(out=19, bias=torch.zeros(19)))
    ),
    "an adapter of another module": lambda k: k.linear(
        X, [int8(), int8(out=30)], [0, 1], batch(adapter(1, **low_rank()))
    ),
    "adapters: y of half precision": lambda k: k.add_adapters_(
        torch.zeros(3, 20).half(), X, 0, batch(adapter(**low_rank()))
    ),
    "adapters: y transposed": lambda k: k.add_adapters_(
        torch.zeros(20, 3).T, X, 0, batch(adapter(**low_rank()))
    ),
    "adapters: x of half precision": lambda k: k.add_adapters_(
        torch.zeros(3, 20), X.half(), 0, batch(adapter(**low_rank()))
    ),
    "adapters: other rows": lambda k: k.add_adapters_(
        torch.zeros(4, 20), X, 0, batch(adapter(**low_rank()))
    ),
    "adapters: a segment beyond the rows": lambda k: k.add_adapters_(
        torch.zeros(3, 20), X, 0, batch(adapter(**low_rank()), 0, 4)
    ),
    "adapters: other inputs": lambda k: k.add_adapters_(
        torch.zeros(3, 20), torch.zeros(3, 9), 0, batch(adapter(**low_rank()))
    ),
    "adapters: other outputs": lambda k: k.add_adapters_(
        torch.zeros(3, 21), X, 0, batch(adapter(**low_rank()))
    ),
    "adapters: no inputs": lambda k: k.add_adapters_(
        torch.zeros(3, 20), torch.zeros(3, 0), 0, batch(adapter())
    ),
    "input scales: half rows": lambda k: k.scale_input(
        X.half(), 0, batch(adapter(in_scale=torch.ones(8)))
    ),
    "input scales: other inputs": lambda k: k.scale_input(
        torch.zeros(3, 900), 0, batch(adapter(in_scale=torch.ones(8)))
    ),
    "input scales: a segment beyond the rows": lambda k: k.scale_input(
        X, 0, batch(adapter(in_scale=torch.ones(8)), 1, 4)
    ),
    "input scales: no inputs": lambda k: k.scale_input(
        torch.zeros(3, 0), 0, batch(adapter(in_=0, in_scale=torch.ones(0)))
    ),
    "unpack: beyond the outputs": lambda k: k.unpack_(int8(), 0, 21, True, torch.zeros(8, 21)),
    "unpack: a negative start": lambda k: k.unpack_(int8(), -1, 1, True, torch.zeros(8, 2)),
    "unpack: nothing": lambda k: k.unpack_(int8(), 2, 2, True, torch.zeros(8, 0)),
    "unpack: into less": lambda k: k.unpack_(int8(), 0, 20, True, torch.zeros(8, 19)),
    "unpack: into halves": lambda k: k.unpack_(int8(), 0, 20, True, torch.zeros(8, 20).half()),
    "unpack: into a view": lambda k: k.unpack_(int8(), 0, 20, True, torch.zeros(20, 8).T),
}

ELEMENTWISE: dict[str, Call] = {
    "norm: double rows": lambda k: k.rms_norm(X.double(), torch.ones(8), 0.0, 1e-6),
    "norm: a half weight": lambda k: k.rms_norm(X, torch.ones(8).half(), 0.0, 1e-6),
    "norm: a weight of another size": lambda k: k.rms_norm(X, torch.ones(7), 0.0, 1e-6),
    "norm: a weight of no size": lambda k: k.rms_norm(torch.zeros(3, 0), torch.ones(0), 0.0, 1e-6),
    "norm: a weight that lies apart": lambda k: k.rms_norm(X, torch.ones(16)[::2], 0.0, 1e-6),
    "gate: an unknown activation": lambda k: k.gate_(X.clone(), X, "relu"),
    "gate: other sizes": lambda k: k.gate_(X.clone(), torch.zeros(8, 3), "silu"),
    "gate: halves": lambda k: k.gate_(X.half(), X.half(), "silu"),
    "gate: a half": lambda k: k.gate_(X.clone(), X.half(), "silu"),
    "gate: a view": lambda k: k.gate_(torch.zeros(8, 3).T, X, "silu"),
    "gate: beside a view": lambda k: k.gate_(X.clone(), torch.zeros(8, 3).T, "silu"),
}


def nf4_codes(**given: Tensor) -> Call:
    of_two_blocks = {
        "weight": torch.zeros(128),
        "bounds": torch.zeros(15),
        "codes": torch.zeros(64, dtype=torch.uint8),
        "absmax": torch.zeros(2),
    }
    return lambda k: k.quantize_nf4_(**of_two_blocks | given)


QUANTIZE: dict[str, Call] = {
    "nf4: half weights": nf4_codes(weight=torch.zeros(128).half()),
    "nf4: a weight that lies apart": nf4_codes(weight=torch.zeros(256)[::2]),
    "nf4: a block that is not whole": nf4_codes(weight=torch.zeros(127)),
    "nf4: fewer bounds": nf4_codes(bounds=torch.zeros(14)),
    "nf4: codes of less": nf4_codes(codes=torch.zeros(63, dtype=torch.uint8)),
    "nf4: codes of int8": nf4_codes(codes=torch.zeros(64, dtype=torch.int8)),
    "nf4: more scales": nf4_codes(absmax=torch.zeros(3)),
}


def plan(
    slots: Tensor | None = None,
    blocks: Tensor | None = None,
    chunks: list[tuple[int, int, int, int]] | None = None,
    block_size: int = 16,
) -> Any:
    """By default three rows, positions 15 to 17 of a sequence in blocks 1 and 0."""
    return kernels().Plan(
        torch.tensor([31, 0, 1]) if slots is None else slots,
        torch.tensor([1, 0]) if blocks is None else blocks,
        [(0, 3, 15, 0)] if chunks is None else chunks,
        block_size,
    )


HUGE = 2**63 - 1

PLANS: dict[str, Call] = {
    "int32 slots": lambda k: plan(slots=torch.tensor([31, 0, 1]).int()),
    "int32 blocks": lambda k: plan(blocks=torch.tensor([1, 0]).int()),
    "slots that lie apart": lambda k: plan(slots=torch.zeros(6, dtype=LONG)[::2]),
    "a negative block": lambda k: plan(blocks=torch.tensor([1, -1])),
    "a negative slot": lambda k: plan(slots=torch.tensor([31, -1, 1])),
    "blocks of no size": lambda k: plan(block_size=0),
    "blocks of a negative size": lambda k: plan(block_size=-16),
    "a negative row": lambda k: plan(chunks=[(-1, 3, 15, 0)]),
    "rows beyond the step": lambda k: plan(chunks=[(1, 3, 14, 0)]),
    "a row far beyond the step": lambda k: plan(chunks=[(HUGE, 3, 14, 0)]),
    "no rows": lambda k: plan(chunks=[(0, 0, 15, 0)]),
    "a negative number of rows": lambda k: plan(chunks=[(1, -1, 15, 0)]),
    "as many rows as there are numbers": lambda k: plan(chunks=[(0, HUGE, 15, 0)]),
    "a negative position": lambda k: plan(chunks=[(0, 3, -1, 0)]),
    "a position beyond the table": lambda k: plan(chunks=[(0, 3, 30, 0)]),
    "a position far beyond the table": lambda k: plan(chunks=[(0, 3, HUGE, 0)]),
    "a negative offset": lambda k: plan(chunks=[(0, 3, 0, -1)]),
    "an offset beyond the tables": lambda k: plan(chunks=[(0, 3, 15, 1)]),
    "an offset far beyond the tables": lambda k: plan(chunks=[(0, 3, 15, HUGE)]),
}


def attention(**changed: Any) -> Any:
    """Four query heads and two of keys, twelve numbers wide, values eight, two blocks of 16."""
    given: dict[str, Any] = {
        "queries": torch.zeros(1, 4, 3, 12),
        "keys": torch.zeros(1, 2, 3, 12),
        "values": torch.zeros(1, 2, 3, 8),
        "cos": None,
        "sin": None,
        "key_cache": torch.zeros(2, 2, 12, 16),
        "value_cache": torch.zeros(2, 2, 16, 8),
        "plan": plan(),
        "scale": 1.0,
    }
    return kernels().attention(**(given | changed))


ATTENTION: dict[str, Call] = {
    "half queries": lambda k: attention(queries=torch.zeros(1, 4, 3, 12).half()),
    "double values": lambda k: attention(values=torch.zeros(1, 2, 3, 8).double()),
    "bfloat16 caches": lambda k: attention(
        key_cache=torch.zeros(2, 2, 12, 16).bfloat16(),
        value_cache=torch.zeros(2, 2, 16, 8).bfloat16(),
    ),
    "caches of two dtypes": lambda k: attention(key_cache=torch.zeros(2, 2, 12, 16).half()),
    "a cache of three dimensions": lambda k: attention(key_cache=torch.zeros(4, 12, 16)),
    "a cache that lies apart": lambda k: attention(
        key_cache=torch.zeros(2, 2, 16, 12).transpose(2, 3)
    ),
    "fewer value blocks": lambda k: attention(value_cache=torch.zeros(1, 2, 16, 8)),
    "value blocks of another size": lambda k: attention(value_cache=torch.zeros(2, 2, 8, 8)),
    "other value heads": lambda k: attention(value_cache=torch.zeros(2, 1, 16, 8)),
    "a block beyond the cache": lambda k: attention(plan=plan(blocks=torch.tensor([1, 2]))),
    "a slot beyond the cache": lambda k: attention(plan=plan(slots=torch.tensor([31, 32, 1]))),
    "a plan for other block sizes": lambda k: attention(
        plan=k.Plan(torch.tensor([31, 0, 1]), torch.tensor([0]), [(0, 3, 15, 0)], 32)
    ),
    "a plan of fewer rows": lambda k: attention(
        plan=plan(torch.tensor([5]), chunks=[(0, 1, 5, 0)])
    ),
    "a plan of more rows": lambda k: attention(
        plan=plan(torch.tensor([4, 5, 6, 7]), chunks=[(0, 4, 4, 0)])
    ),
    "heads that do not divide": lambda k: attention(queries=torch.zeros(1, 3, 3, 12)),
    "fewer key heads": lambda k: attention(keys=torch.zeros(1, 1, 3, 12)),
    "queries of another size": lambda k: attention(queries=torch.zeros(1, 4, 3, 8)),
    "values of another size": lambda k: attention(values=torch.zeros(1, 2, 3, 12)),
    "fewer key rows": lambda k: attention(keys=torch.zeros(1, 2, 2, 12)),
    "two batches": lambda k: attention(
        queries=torch.zeros(3, 4, 1, 12), keys=torch.zeros(3, 2, 1, 12),
        values=torch.zeros(3, 2, 1, 8),
    ),
    "five dimensions": lambda k: attention(queries=torch.zeros(1, 4, 3, 1, 12)),
    "two dimensions": lambda k: attention(queries=torch.zeros(36, 12)),
    "one dimension": lambda k: attention(queries=torch.zeros(144)),
    "numbers that lie apart": lambda k: attention(queries=torch.zeros(1, 4, 12, 3).transpose(2, 3)),
    "no heads": lambda k: attention(
        queries=torch.zeros(1, 0, 3, 12), keys=torch.zeros(1, 0, 3, 12),
        values=torch.zeros(1, 0, 3, 8), key_cache=torch.zeros(2, 0, 12, 16),
        value_cache=torch.zeros(2, 0, 16, 8),
    ),
    "cos without sin": lambda k: attention(cos=torch.zeros(3, 12)),
    "sin without cos": lambda k: attention(sin=torch.zeros(3, 12)),
    "more turning than there is": lambda k: attention(
        cos=torch.zeros(3, 14), sin=torch.zeros(3, 14)
    ),
    "an odd number turning": lambda k: attention(cos=torch.zeros(3, 5), sin=torch.zeros(3, 5)),
    "cos of fewer rows": lambda k: attention(cos=torch.zeros(1, 12), sin=torch.zeros(3, 12)),
    "sin of fewer rows": lambda k: attention(cos=torch.zeros(3, 12), sin=torch.zeros(1, 12)),
    "half cos": lambda k: attention(cos=torch.zeros(3, 12).half(), sin=torch.zeros(3, 12).half()),
    "sinks of key heads": lambda k: attention(sinks=torch.zeros(2)),
    "double sinks": lambda k: attention(sinks=torch.zeros(4).double()),
    "a window of nothing": lambda k: attention(window=0),
    "a negative window": lambda k: attention(window=-3),
    "a window without causality": lambda k: attention(window=3, causal=False),
}  # fmt: skip

CASES = {
    f"{kind}: {name}": call
    for kind, calls in {
        "weight": WEIGHTS, "adapter": ADAPTERS, "launch": LAUNCHES, "elementwise": ELEMENTWISE,
        "plan": PLANS, "attention": ATTENTION, "quantize": QUANTIZE,
    }.items()
    for name, call in calls.items()
}  # fmt: skip


@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_what_does_not_fit_is_refused(ops: Any, call: Call) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call(ops)


def test_what_the_cases_begin_with_fits(ops: Any) -> None:
    """Each case differs from these by what its name says."""
    made = adapter(**low_rank(), in_scale=torch.ones(8), out_scale=torch.ones(20))
    assert ops.linear(X, [int8(bias=torch.zeros(20))], [0], batch(made))[0].shape == (3, 20)
    ops.add_adapters_(torch.zeros(3, 20), X, 0, batch(made))
    ops.scale_input(X, 0, batch(made))
    ops.unpack_(int8(), 0, 20, True, torch.zeros(8, 20))
    ops.rms_norm(X, torch.ones(8), 0.0, 1e-6)
    ops.gate_(X.clone(), X, "silu")
    nf4_codes()(ops)
    nf4(2, 1, 16)
    nf4(2, 2, 16)
    codes = torch.zeros(2, 2, 16, 4, dtype=torch.int8)
    for bits in (0, 8, 16, 24):
        ops.Weight(codes, torch.ones(2, 16), None, 20, 8, bits)
    assert attention().shape == (1, 3, 4, 8)
    attention(
        cos=torch.zeros(3, 12), sin=torch.zeros(3, 12), window=1, softcap=1.0, sinks=torch.zeros(4)
    )


def test_a_refused_launch_changes_nothing(ops: Any) -> None:
    """Nothing is written before all has been checked."""
    y, keys, values = torch.ones(3, 20), torch.ones(2, 2, 12, 16), torch.ones(2, 2, 16, 8)
    with pytest.raises(ValueError, match="segment"):
        ops.add_adapters_(y, X, 0, batch(adapter(**low_rank(), out_scale=torch.zeros(20)), 0, 4))
    with pytest.raises(ValueError, match="sinks"):
        attention(key_cache=keys, value_cache=values, sinks=torch.zeros(2))
    assert all(bool((t == 1).all()) for t in (y, keys, values))
