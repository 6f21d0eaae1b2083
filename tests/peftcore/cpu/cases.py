"""What the kernels' tests share: weights of random codes, and the float64 they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from peftcore.ops import LowRankPart, VectorPart, reference
from peftcore.ops.cpu import kernels
from peftcore.ops.tiles import tiled
from peftcore.quant.packed import pack_int8, pack_nf4

BLOCK = 64  # bitsandbytes' weights of one nf4 scale


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(call: Callable[[], Any]) -> list[Any]:
    """The results with one thread, and with two."""
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(call())
    return found


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Base:
    """A quantized weight as the kernels see it, and as float64 `[out, in]` by the formats'
    definitions."""

    kernel: Any
    exact: Tensor
    bias: Tensor | None

    @classmethod
    def make(
        cls,
        quantization: str,
        out: int,
        in_: int,
        *,
        bias: bool = False,
        seed: int = 0,
        activation_bits: int = 0,
    ) -> Base:
        """Of random codes, with scales that differ much from one to the next.

        Where inputs are rounded to one byte or two, `exact` has nf4's values rounded to 127ths, as
        the kernel does.
        """
        g = generator(seed)
        b = torch.randn(out, generator=g) if bias else None
        if quantization == "int8":
            codes = torch.randint(-127, 128, (out, in_), generator=g, dtype=torch.int8)
            absmax = torch.rand(out, generator=g) + 0.1
            packed = pack_int8(codes, absmax)
            exact = codes.double() * (absmax.double() / 127)[:, None]
        else:
            ids = torch.randint(0, 16, (out, in_), generator=g, dtype=torch.uint8)
            absmax = torch.rand(-(-out * in_ // BLOCK), generator=g) + 0.1
            high, low = ids[:, ::2], ids[:, 1::2]
            packed = pack_nf4((high << 4 | low).reshape(-1, 1), absmax, out, in_, BLOCK)
            table = bnb.functional.get_4bit_type("nf4", device="cpu").double()
            if activation_bits in (8, 16):
                table = (table * 127).round() / 127
            scales = absmax.double().repeat_interleave(BLOCK)[: out * in_]
            exact = table[ids.long()] * scales.view(out, in_)
        return cls(kernels().Weight(*packed, b, out, in_, activation_bits), exact, b)

    def multiply(self, x: Tensor) -> Tensor:
        """W x + b in float64."""
        y = x.double() @ self.exact.T
        return y if self.bias is None else y + self.bias.double()

    def magnitude(self, x: Tensor) -> Tensor:
        """What rounding errors are measured by: the same sum of absolute values."""
        y = x.double().abs() @ self.exact.abs().T
        return y + 1 if self.bias is None else y + self.bias.double().abs() + 1


@dataclass(frozen=True)
class At:
    """What one adapter does at a module: A `[rank, in]`, B `[out, rank]`, and vectors; scales of
    factors that are codes, `[rank]`."""

    in_: int
    out: int
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0
    scales: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def make(
        cls,
        in_: int,
        out: int,
        rank: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        vectors: str = "",
        seed: int = 0,
    ) -> At:
        """`vectors`: which of i(nput scale), o(utput scale), b(ias) there are."""
        g = generator(seed)
        at = cls(in_, out)
        if rank:
            a, b = torch.randn(rank, in_, generator=g), torch.randn(out, rank, generator=g) / rank
            at = replace(at, scale=0.75 + seed % 3)
            if dtype == torch.int8:
                a, b = (x.mul(127 / x.abs().max()).round() for x in (a, b))
                at = replace(at, scales=torch.rand(rank, generator=g) * 1e-3)
            at = replace(at, a=a.to(dtype), b=b.to(dtype))
        if "i" in vectors:
            at = replace(at, in_scale=torch.rand(in_, generator=g) + 0.5)
        if "o" in vectors:
            at = replace(at, out_scale=torch.rand(out, generator=g) + 0.5)
        if "b" in vectors:
            at = replace(at, bias=torch.randn(out, generator=g))
        return at

    @property
    def a_t(self) -> Tensor | None:
        """Aᵀ, with the scales, in float64."""
        if self.a is None:
            return None
        a_t = self.a.T.double()
        return a_t if self.scales is None else a_t * self.scales.double()

    def put(self, adapter: Any, id_: int) -> None:
        factors = {"a": self.a, "b": None if self.b is None else tiled(self.b)}
        if self.a is not None and self.b is not None and self.scales is not None:
            a, scales = pack_int8(self.a, 127 * self.scales)
            b, _ = pack_int8(self.b, torch.ones(len(self.b)))
            factors = {"a": a, "b": b, "scales": scales}
        adapter.set(
            id_, self.in_, self.out, **factors, scale=self.scale, in_scale=self.in_scale,
            out_scale=self.out_scale, bias=self.bias,
        )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows [start, end) use an adapter (module id → what it does) with a weight."""

    start: int
    end: int
    adapter: dict[int, At]
    weight: float = 1.0

    @cached_property
    def kernel(self) -> Any:
        made = kernels().Adapter()
        for id_, at in self.adapter.items():
            at.put(made, id_)
        return made


def batch_of(segments: Sequence[Rows]) -> Any:
    return kernels().Batch([(s.start, s.end, s.kernel, s.weight) for s in segments])


def scaled(x: Tensor, id_: int, segments: Sequence[Rows]) -> Tensor:
    """x ⊙ the input scales, in float64."""
    exact = x.double().clone()
    at = [(s, s.adapter[id_]) for s in segments if id_ in s.adapter]
    scales = [VectorPart(s.start, s.end, a.in_scale) for s, a in at if a.in_scale is not None]
    reference.scale_(exact, scales)
    return exact


def adapted(y: Tensor, x: Tensor, id_: int, segments: Sequence[Rows]) -> Tensor:
    """y with what the segments do to it, x scaled already, in float64."""
    y = y.double().clone()
    low_rank, scales, biases = [], [], []
    for s in segments:
        at = s.adapter.get(id_)
        if at is None:
            continue
        if at.a_t is not None and at.b is not None:
            factor = at.scale * s.weight
            low_rank.append(LowRankPart(s.start, s.end, at.a_t, at.b.T, factor))
        if at.out_scale is not None:
            scales.append(VectorPart(s.start, s.end, at.out_scale))
        if at.bias is not None:
            biases.append(VectorPart(s.start, s.end, at.bias, s.weight))
    reference.add_low_rank_(y, x.double(), low_rank)
    reference.scale_(y, scales)
    reference.add_(y, biases)
    return y


def absolute(segments: Sequence[Rows]) -> list[Rows]:
    """The same with every number's absolute value: what rounding errors are measured by."""

    def of(at: At) -> At:
        tensors: dict[str, Any] = {
            name: value.abs() for name, value in vars(at).items() if torch.is_tensor(value)
        }
        return replace(at, scale=abs(at.scale), **tensors)

    return [
        Rows(s.start, s.end, {id_: of(at) for id_, at in s.adapter.items()}, abs(s.weight))
        for s in segments
    ]


def assert_near(found: Tensor, exact: Tensor, magnitude: Tensor | float) -> None:
    """Within float32's rounding of sums of this magnitude; a NaN is never near."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    assert bool((error <= 2e-6 * magnitude).all()), f"off by {float((error / magnitude).max())}"
