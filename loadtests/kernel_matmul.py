"""Quantized matmul against torch's, oneDNN's and bitsandbytes': one weight, and a model's all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from loadtests.contest import (
    Contender,
    Unavailable,
    copies_of,
    figures,
    num_copies,
    number,
    percent,
    race,
    relative_error,
    table,
)
from loadtests.machine import Watch, prepacked
from peftcore.ops.cpu import kernels
from peftcore.quant import Activations, Quantization, QuantLinear
from peftcore.quant.linear import activation_bits

#: (out, in): of SmolLM2-135M's layers and head, then of a model of about 10⁹ weights.
SHAPES = (
    (1536, 576), (576, 1536), (576, 576), (192, 576), (49152, 576),
    (2048, 2048), (8192, 2048), (2048, 8192),
)  # fmt: skip
ROWS = (1, 4, 16, 64, 256, 1024)
#: A head computes the rows that are sampled from, never a whole prompt.
_HEAD_OUT, _HEAD_ROWS = 32768, 64
#: SmolLM2-135M: layers, launches of a layer (modules that read the same input), the head.
_LAYERS = 30
LAUNCHES = (
    ((576, 576), (192, 576), (192, 576)), ((576, 576),), ((1536, 576), (1536, 576)), ((576, 1536),),
)  # fmt: skip
_HEAD = (49152, 576)

BASELINE = "F.linear fp32"
#: Name → how weights and inputs are kept.
FORMS: dict[str, tuple[Quantization, Activations]] = {
    "ours int8": ("int8", "float"),
    "ours int8 by int16": ("int8", "int16"),
    "ours int8 by int8": ("int8", "int8"),
    "ours nf4": ("nf4", "float"),
    "ours nf4 by int16": ("nf4", "int16"),
    "ours nf4 by int8": ("nf4", "int8"),
}
OURS = tuple(FORMS)
_GROUP = 64  # weights of a 4-bit scale

Shape = tuple[int, int]


def run(
    *,
    shapes: Sequence[Shape],
    rows: Sequence[int],
    repeats: int,
    max_seconds: float,
    step: Callable[[], object],
    watch: Watch,
) -> list[dict[str, Any]]:
    """A record for every shape, number of rows and contender; `step` is called after each race."""
    records = []
    for shape in shapes:
        weights = Weights(shape)
        for num_rows in rows_of(shape, rows):
            x = torch.randn(num_rows, shape[1])
            contenders = weights.contenders(x)
            timings = race(contenders, repeats=repeats, max_seconds=max_seconds, watch=watch)
            baseline = timings[BASELINE].seconds
            for c in contenders:
                record: dict[str, Any] = {
                    "section": "matmul", "shape": list(shape), "rows": num_rows,
                    "contender": c.name, "note": c.note,
                }  # fmt: skip
                if c.name in timings:
                    flop = 2.0 * num_rows * shape[0] * shape[1]
                    record |= figures(timings[c.name], flop, c.num_bytes)
                    record |= {"ratio": baseline / timings[c.name].seconds, "error": c.error}
                records.append(record)
            step()
    return records


def rows_of(shape: Shape, rows: Sequence[int]) -> list[int]:
    """Those numbers of rows that a weight of this shape meets."""
    return [n for n in rows if shape[0] < _HEAD_OUT or n <= _HEAD_ROWS]


# -- contenders ------------------------------------------------------------------------------------


class Weights:
    """One random weight `[out, in]` in every contender's own form, in cold copies."""

    def __init__(self, shape: Shape) -> None:
        self.weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._made: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        self._bytes: dict[str, float] = {}
        self._why: dict[str, str] = {}
        self._forms: dict[str, Callable[[], Iterator[Callable[[Tensor], Tensor]]]] = {
            **{name: partial(self._ours, name) for name in FORMS},
            BASELINE: self._fp32,
            "F.linear bf16": self._bf16,
            "torch int8pack bf16": self._int8pack,
            "torch int4pack bf16": self._int4pack,
            "fbgemm dynamic int8": self._fbgemm,
            "bnb int8": self._bnb_int8,
            "bnb nf4 dequantize": self._bnb_nf4,
            "bnb nf4 gemm bf16": self._bnb_gemm,
        }

    def contenders(self, x: Tensor) -> list[Contender]:
        """For rows x `[rows, in]`; those that want bf16 get it, and give it back."""
        exact = x.double() @ self.weight.double().T
        found = [
            Contender.make(name, partial(self._contender, name, x, exact)) for name in self._forms
        ]
        packed = Contender.make("oneDNN packed fp32", lambda: self._prepacked(x, exact))
        found.insert(list(self._forms).index(BASELINE) + 1, packed)
        return found

    def _contender(self, name: str, x: Tensor, exact: Tensor) -> Contender:
        if name in self._why:
            raise Unavailable(self._why[name])
        try:
            if name not in self._made:
                self._made[name] = list(self._forms[name]())
            given = x.bfloat16() if name.endswith("bf16") else x
            error = relative_error(self._made[name][0](given), exact)
        except (AttributeError, NotImplementedError, RuntimeError, Unavailable) as exc:
            self._made.pop(name, None)
            self._why[name] = str(exc) or type(exc).__name__
            raise
        calls = [partial(multiply, given) for multiply in self._made[name]]
        return Contender(name, calls, self._bytes[name], error)

    def _prepacked(self, x: Tensor, exact: Tensor) -> Contender:
        """Its order depends on the number of rows: made anew for each."""
        made = [prepacked(weight, len(x)) for (weight,) in copies_of([self.weight])]
        first = made[0]
        if first is None:
            raise Unavailable("this torch has no mkldnn::_reorder_linear_weight")
        error = relative_error(first(x), exact)
        calls = [partial(multiply, x) for multiply in made if multiply]
        return Contender("oneDNN packed fp32", calls, self.weight.nbytes, error)

    def _cold(self, name: str, *tensors: Tensor) -> list[list[Tensor]]:
        self._bytes[name] = sum(t.nbytes for t in tensors)
        return copies_of(tensors)

    def _ours(self, name: str) -> Iterator[Callable[[Tensor], Tensor]]:
        quantization, activations = FORMS[name]
        layer = QuantLinear(self.weight, None, quantization)
        if not layer.packed:
            raise Unavailable("no kernels for this weight")
        ops, bits = kernels(), activation_bits(activations)
        for codes, scales in self._cold(name, layer.codes, layer.absmax):
            weight = ops.Weight(codes, scales, None, *self.weight.shape, bits)
            yield _launch(ops.linear, [weight], [-1])

    def _fp32(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for (weight,) in self._cold(BASELINE, self.weight):
            yield after_x(F.linear, weight)

    def _bf16(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for (weight,) in self._cold("F.linear bf16", self.weight.bfloat16()):
            yield after_x(F.linear, weight)

    def _int8pack(self) -> Iterator[Callable[[Tensor], Tensor]]:
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(self.weight)
        scales = (absmax / 127).bfloat16()
        for c, s in self._cold("torch int8pack bf16", codes, scales):
            yield after_x(torch._weight_int8pack_mm, c, s)

    def _int4pack(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Asymmetric groups: code · scale + zero, zero at code 8."""
        out, in_ = self.weight.shape
        groups = self.weight.view(out, in_ // _GROUP, _GROUP)
        low = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - low) / 15
        codes = ((groups - low) / scale).round().to(torch.int32).view(out, in_)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        pairs = torch.cat([scale, low + 8 * scale], dim=-1).transpose(0, 1)
        for c, p in self._cold("torch int4pack bf16", packed, pairs.contiguous().bfloat16()):
            yield after_x(torch.ops.aten._weight_int4pack_mm_for_cpu, c, _GROUP, p)

    def _fbgemm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise Unavailable("this torch has no fbgemm")
        torch.backends.quantized.engine = "fbgemm"
        scales = self.weight.abs().amax(1) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and what is compared with
            codes = torch.quantize_per_channel(self.weight, scales, zeros, 0, torch.qint8)
        self._bytes["fbgemm dynamic int8"] = self.weight.numel() + 4 * len(scales)
        for _ in range(num_copies(self._bytes["fbgemm dynamic int8"])):
            packed = torch.ops.quantized.linear_prepack(codes, None)
            yield after_x(torch.ops.quantized.linear_dynamic, packed)

    def _bnb_int8(self) -> Iterator[Callable[[Tensor], Tensor]]:
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(self.weight)
        for c, s in self._cold("bnb int8", codes, absmax):
            state = bnb.MatmulLtState()
            state.CB, state.SCB, state.has_fp16_weights, state.threshold = c, s, False, 0.0
            yield after_x(_bnb_matmul, c, state)

    def _bnb_nf4(self) -> Iterator[Callable[[Tensor], Tensor]]:
        codes, state = bnb.functional.quantize_4bit(
            self.weight, blocksize=_GROUP, quant_type="nf4", compress_statistics=False
        )
        for c, s in self._cold("bnb nf4 dequantize", codes, state.absmax):
            own = copy.copy(state)
            own.absmax = s
            yield after_x(bnb.matmul_4bit, c.t(), own)

    def _bnb_gemm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A layer of its own, which repacks itself at its first call where there is a kernel."""
        out, in_ = self.weight.shape
        if out % 32:
            raise Unavailable("bitsandbytes packs 32 outputs together")
        layer: Any = bnb.nn.Linear4bit(
            in_, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            self.weight.bfloat16(), requires_grad=False, blocksize=_GROUP, quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        layer = layer.to("cpu").eval()
        layer(torch.zeros(1, in_, dtype=torch.bfloat16))
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise Unavailable("bitsandbytes repacks only where there is AVX512-BF16")
        state = layer.weight.quant_state
        self._bytes["bnb nf4 gemm bf16"] = layer.weight.nbytes + state.absmax.nbytes
        for _ in range(num_copies(self._bytes["bnb nf4 gemm bf16"])):
            yield copy.deepcopy(layer)


def after_x(function: Callable[..., Tensor], *args: Any) -> Callable[[Tensor], Tensor]:
    """x → function(x, *args)."""
    return lambda x: function(x, *args)


def _launch(linear: Callable[..., list[Tensor]], *args: Any) -> Callable[[Tensor], Tensor]:
    """x → the result of a launch over one module."""
    return lambda x: linear(x, *args)[0]


def _bnb_matmul(x: Tensor, codes: Tensor, state: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it quantizes its input
        return bnb.matmul(x, codes, state=state)


# -- a whole model's -------------------------------------------------------------------------------


def run_model(*, repeats: int, step: Callable[[], object], watch: Watch) -> list[dict[str, Any]]:
    """All linears of SmolLM2-135M at one row, in launches as the engine makes them."""
    shapes = [shape for launch in LAUNCHES for shape in launch] * _LAYERS + [_HEAD]
    flop = 2.0 * sum(out * in_ for out, in_ in shapes)
    inputs = {in_: torch.randn(1, in_) for _, in_ in shapes}
    contenders = []
    builders: dict[str, Callable[[], tuple[Callable[[], Any], float]]] = {
        **{name: partial(_model_of_ours, *form, inputs) for name, form in FORMS.items()},
        BASELINE: lambda: _model_of_torch(shapes, inputs),
    }
    for name, build in builders.items():
        contenders.append(Contender.make(name, partial(_whole, name, build)))
        step()
    timings = race(contenders, repeats=max(repeats, 5), max_seconds=5.0, watch=watch)
    records = []
    for c in contenders:
        record: dict[str, Any] = {"section": "model", "contender": c.name, "note": c.note}
        if c.name in timings:
            record |= figures(timings[c.name], flop, c.num_bytes)
            record["megabytes"] = c.num_bytes / 1e6
            record["ratio"] = timings[BASELINE].seconds / timings[c.name].seconds
        records.append(record)
    step()
    return records


def _whole(name: str, build: Callable[[], tuple[Callable[[], Any], float]]) -> Contender:
    call, num_bytes = build()
    return Contender(name, [call], num_bytes)


def _model_of_ours(
    quantization: Quantization, activations: Activations, inputs: dict[int, Tensor]
) -> tuple[Callable[[], None], float]:
    """The head is int8 under either choice, as `quantize_model` has it."""
    ops, num_bytes = kernels(), 0
    if ops is None:
        raise Unavailable("no kernels")
    launches: list[tuple[tuple[Shape, ...], Quantization]] = [
        *((launch, quantization) for launch in LAUNCHES * _LAYERS),
        ((_HEAD,), "int8"),
    ]
    made: dict[tuple[Shape, Any], QuantLinear] = {}
    plan: list[tuple[Tensor, list[Any], list[int]]] = []
    for launch, form in launches:
        weights = []
        for shape in launch:
            if (shape, form) not in made:
                made[shape, form] = QuantLinear(torch.randn(shape), None, form)
            layer = made[shape, form]
            tensors = layer.codes.clone(), layer.absmax.clone()
            weights.append(ops.Weight(*tensors, None, *shape, activation_bits(activations)))
            num_bytes += layer.codes.nbytes + layer.absmax.nbytes
        plan.append((inputs[launch[0][1]], weights, [-1] * len(weights)))

    def call() -> None:
        for x, weights, ids in plan:
            ops.linear(x, weights, ids)

    return call, num_bytes


def _model_of_torch(
    shapes: Sequence[Shape], inputs: dict[int, Tensor]
) -> tuple[Callable[[], None], float]:
    weights = [torch.randn(shape) for shape in shapes]

    def call() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return call, sum(w.nbytes for w in weights)


# -- tables ----------------------------------------------------------------------------------------


def show(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table a shape: milliseconds, and the ratio to `BASELINE`; then what ours come to."""
    for shape in dict.fromkeys(tuple(r["shape"]) for r in records):
        of = [r for r in records if tuple(r["shape"]) == shape]
        rows = list(dict.fromkeys(r["rows"] for r in of))
        cells = {(r["contender"], r["rows"]): r for r in of}
        lines = []
        for name in dict.fromkeys(r["contender"] for r in of):
            found = [cells[name, n] for n in rows]
            if any("ms" in r for r in found):
                error = next(r["error"] for r in found if "ms" in r)
                values = [_time_and_ratio(r) for r in found]
                lines.append([name, *values, f"{100 * error:.2g}%"])
            else:
                lines.append([name, *["-"] * len(rows), ""])
        for name in OURS:
            for key, unit in (("gflops", "GFLOP/s"), ("read_gb", "GB/s"), ("limit_share", "limit")):
                found = [cells[name, n] for n in rows if (name, n) in cells]
                if any(key in r for r in found):
                    lines.append([f"  {name}: {unit}", *(_figure(r, key) for r in found), ""])
        titles = [f"{shape[0]} x {shape[1]}", *(f"{n} rows" for n in rows), "error"]
        yield table(titles, lines)
    notes = {r["contender"]: r["note"] for r in records if r["note"]}
    for name, note in notes.items():
        yield f"{name}: not available: {note}"


def show_model(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    lines = []
    for r in records:
        if "ms" in r:
            values = [number(r[key]) for key in ("ms", "megabytes", "read_gb")]
            lines.append([r["contender"], *values, _figure(r, "limit_share"), f"{r['ratio']:.2f}x"])
        else:
            lines.append([r["contender"], r["note"], *[""] * 4])
    yield table(["SmolLM2-135M, 1 row", "ms", "MB", "GB/s", "limit", "ratio"], lines)


def _time_and_ratio(record: dict[str, Any]) -> str:
    return f"{number(record['ms'])} {record['ratio']:.2f}x" if "ms" in record else "-"


def _figure(record: dict[str, Any], key: str) -> str:
    return (percent if key == "limit_share" else number)(record.get(key))
