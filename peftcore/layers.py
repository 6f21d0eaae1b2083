"""The base's modules with the batch's adapters on top.

`attach` replaces the modules that primitives act on by wrappers sharing one `AdapterHost`; before
a forward pass the engine sets the host's batch. A module that no adapter of the batch touches does
what it did before. The kernels that `ops.select` gives add low-rank updates, scales and biases to
linear modules (on a CPU in one launch with the base's map); what they do not know is done here,
after them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from peftcore.base import BaseModel
from peftcore.branches import branches_of
from peftcore.errors import UnsupportedError
from peftcore.ops import (
    BlocksPart,
    LowRankPart,
    MapPart,
    RowsPart,
    VectorPart,
    grouped,
    select,
)
from peftcore.ops.bottleneck import BottleneckPart, post_norm, pre_norm
from peftcore.ops.cpu import kernels
from peftcore.ops.segments import module_id
from peftcore.packing import BoundAdapter, ModuleWeights
from peftcore.program import surface_of
from peftcore.quant import QuantLinear


class Segment(NamedTuple):
    """Rows [start, end) of a packed batch use `adapter`, its additive parts times `weight`.

    Segments of a mixture cover the same rows.
    """

    start: int
    end: int
    adapter: BoundAdapter
    weight: float = 1.0


class VirtualRows(NamedTuple):
    """Rows [start, end) of the batch are virtual tokens: their embeddings are `rows`."""

    start: int
    end: int
    rows: Tensor


class AdapterBatch(NamedTuple):
    """The adapters of one forward pass.

    Attributes:
        tokens: segments over the batch's token rows.
        outputs: segments over the rows for which logits are computed.
        virtual: rows whose embeddings are given.
    """

    tokens: Sequence[Segment] = ()
    outputs: Sequence[Segment] = ()
    virtual: Sequence[VirtualRows] = ()


_CPU = torch.device("cpu")


class AdapterHost:
    """What the wrappers of one model share: the batch that is being computed.

    Attributes:
        touched: the paths of the modules on which some adapter of the batch acts, but for what the
            kernels do.
        kernel_tokens, kernel_outputs: the kernels' segments of the batch, or None.
        kernels: as `ops.select` gives them, or None.
        linears: path → (in, out) of the modules at which the kernels act; None where there are no
            kernels.
        num_rows: the token rows of the running pass, as the input embedding saw them.
        streams: path of a norm → its input `[rows, dim]`, kept until the branch behind it ends,
            where a bottleneck reads it.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self.kernels: Any = select(device)
        self.num_rows = 0
        self.streams: dict[str, Tensor] = {}
        self.linears: dict[str, tuple[int, int]] | None = None
        self._made: deque[tuple[list[KernelSegment], Any]] = deque(maxlen=2)
        self.batch = AdapterBatch()

    @property
    def batch(self) -> AdapterBatch:
        return self._batch

    @batch.setter
    def batch(self, batch: AdapterBatch) -> None:
        self._batch = batch
        adapters = {segment.adapter for segment in (*batch.tokens, *batch.outputs)}
        self.touched: frozenset[str] = frozenset().union(*(a.modules for a in adapters))
        self.kernel_tokens = self.kernel_outputs = self._kernel_batch(batch.tokens)
        if batch.outputs != batch.tokens:  # as they are where each row samples
            self.kernel_outputs = self._kernel_batch(batch.outputs)

    def set_kernel_batch(self, batch: Any) -> None:
        """In place of `batch`: the kernels' own, or None. All that its adapters do the kernels do,
        and every token row has logits."""
        self.batch = AdapterBatch()
        self.kernel_tokens = self.kernel_outputs = batch

    def _kernel_batch(self, segments: Sequence[Segment]) -> Any:
        given = kernel_segments(segments)
        if not given:
            return None
        for made_of, batch in self._made:  # one decode step after another is of the same segments
            if made_of == given:
                return batch
        assert self.kernels is not None, "bound for kernels that are not here"
        batch = self.kernels.Batch(given)
        self._made.append((given, batch))
        return batch


#: (start, end, the kernels' adapter, weight)
KernelSegment = tuple[int, int, Any, float]


def kernel_segments(segments: Sequence[Segment]) -> list[KernelSegment]:
    """Of adapters that the kernels know anything of, what the kernels' batch is made of."""
    return [
        (start, end, adapter.kernel, weight)
        for start, end, adapter, weight in segments
        if adapter.kernel is not None
    ]


class Part(NamedTuple):
    """At one module: rows [start, end) meet `weights`, what adds times `factor`."""

    start: int
    end: int
    weights: ModuleWeights
    factor: float


class AdapterModule(nn.Module):
    """A module of the base under the batch's primitives; its attributes are the base module's.

    The order of the primitives is `peftcore.program`'s.
    """

    def __init__(
        self, base: nn.Module, path: str, host: AdapterHost, is_output: bool = False
    ) -> None:
        super().__init__()
        self.base = base
        self.__dict__["base"] = base  # found without a search: it is asked for in every pass
        self.path = path
        self.is_output = is_output
        self._host = host

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not there yet
                raise
            return getattr(self.base, name)

    def parts(self) -> Sequence[Part]:
        """What the batch does here; nearly free where that is nothing."""
        if self.path not in self._host.touched:
            return ()
        batch = self._host.batch
        return [
            Part(start, end, weights, factor)
            for start, end, adapter, factor in (batch.outputs if self.is_output else batch.tokens)
            if (weights := adapter.modules.get(self.path)) is not None
        ]

    def through_bottlenecks(self, y: Tensor, parts: Sequence[Part]) -> Tensor:
        """The output of a branch before the model adds it to the stream."""
        found = _bottlenecks(parts)
        if not found:
            return y
        streams = self._host.streams
        paths = {part.weights.stream for part in found if part.weights.stream is not None}
        stream = streams[paths.pop()] if paths else None
        result = pre_norm(_rows(y), stream, found).view(y.shape)
        for part in found:
            streams.pop(part.weights.stream or "", None)
        return result


def _bottlenecks(parts: Sequence[Part]) -> list[BottleneckPart]:
    return [
        BottleneckPart(start, end, weights.bottleneck)
        for start, end, weights, _ in parts
        if weights.bottleneck is not None
    ]


class AdapterBranch(AdapterModule):
    """A module that is nothing but the end of a branch: a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, rows, dim]`; returns the same."""
        return self.through_bottlenecks(self.base(x), self.parts())


class AdapterAddNorm(AdapterModule):
    """A module of BERT's kind that ends a branch: linear map, dropout, sum, norm."""

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        """x: `[1, rows, in]`; stream: `[1, rows, dim]`; returns as stream."""
        found = _bottlenecks(self.parts())
        if not found:
            result: Tensor = self.base(x, stream)
            return result
        base: Any = self.base
        return post_norm(base.dropout(base.dense(x)), stream, base.LayerNorm, found)


class AdapterLinear(AdapterModule):
    """A linear module, plain, transposed (Conv1D) or quantized."""

    def __init__(
        self, base: nn.Module, path: str, host: AdapterHost, is_output: bool = False
    ) -> None:
        super().__init__(base, path, host, is_output)
        self.id = module_id(path)

    @property
    def kernel_batch(self) -> Any:
        return self._host.kernel_outputs if self.is_output else self._host.kernel_tokens

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, rows, in]`, or from a model that folds its batch `[rows, in]`; returns the same
        with `out`."""
        return linears((self,), x)[0]

    def compute(self, x: Tensor) -> Tensor:
        """The base's map of x with what the kernels do on top."""
        batch = self.kernel_batch
        if batch is not None and not batch.touches(self.id):
            batch = None
        ops = self._host.kernels
        if ops is kernels() and _is_packed(self.base, x):
            result: Tensor = ops.linear(x, [self.base.kernel], [self.id], batch)[0]
            return result
        if batch is None:
            return self.base(x)
        x = ops.scale_input(x, self.id, batch)
        y: Tensor = self.base(x).contiguous()
        ops.add_adapters_(y, x, self.id, batch)
        return y

    def changed_input(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """x with what the parts change of it, in a copy; x itself where that is nothing."""
        rotations, scales = [], []
        for start, end, weights, _ in parts:
            if weights.rotation is not None:
                rotations.append(BlocksPart(start, end, weights.rotation))
            if weights.input_scale is not None:
                scales.append(VectorPart(start, end, weights.input_scale))
        if rotations or scales:
            x = x.clone()
            grouped.rotate_(_rows(x), rotations)
            grouped.scale_(_rows(x), scales)
        return x

    def finish(self, result: Tensor, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """What the parts do to the base's result of x; changed in place."""
        overrides: list[MapPart] = []
        low_rank: list[LowRankPart] = []
        output_scales: list[VectorPart] = []
        biases: list[VectorPart] = []
        columns: list[RowsPart] = []
        for start, end, weights, factor in parts:
            if weights.override is not None:
                overrides.append(MapPart(start, end, *weights.override))
            if weights.low_rank is not None:
                update = weights.low_rank
                scale = factor * update.scale
                low_rank.append(LowRankPart(start, end, update.a_t, update.b_t, scale))
            if weights.output_scale is not None:
                output_scales.append(VectorPart(start, end, weights.output_scale))
            if weights.bias is not None:
                biases.append(VectorPart(start, end, weights.bias, factor))
            if weights.rows is not None:
                columns.append(RowsPart(start, end, *weights.rows))
        x, y = _rows(x), _rows(result)
        grouped.set_linear_(y, x, overrides)
        grouped.add_low_rank_(y, x, low_rank)
        grouped.scale_(y, output_scales)
        grouped.add_(y, biases)
        if columns:
            bias: Any = self.base.bias
            grouped.set_columns_(y, x, columns, bias)
        return self.through_bottlenecks(result, parts)


def _is_packed(module: nn.Module, x: Tensor) -> bool:
    return isinstance(module, QuantLinear) and module.packed and x.dtype == torch.float32


def linears(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The results of modules that read the same x; one launch where the kernels compute them all.

    Args:
        modules: wrapped or not, with inputs of one size.
        x: as for `AdapterLinear.forward`.
    """
    results: list[Tensor]
    wrapped = [m for m in modules if isinstance(m, AdapterLinear)]
    if len(wrapped) == len(modules) and not wrapped[0]._host.touched:  # most often; in few steps
        ops, weights = wrapped[0]._host.kernels, [m.base for m in wrapped]
        if ops is kernels() and all(_is_packed(weight, x) for weight in weights):
            ids, batch = [m.id for m in wrapped], wrapped[0].kernel_batch
            results = ops.linear(x, [weight.kernel for weight in weights], ids, batch)
            return results
    bases = [m.base if isinstance(m, AdapterLinear) else m for m in modules]
    parts = [m.parts() if isinstance(m, AdapterLinear) else () for m in modules]
    inputs = [
        m.changed_input(x, p) if isinstance(m, AdapterLinear) and p else x
        for m, p in zip(modules, parts, strict=True)
    ]
    batch = wrapped[0].kernel_batch if wrapped else None
    ops = wrapped[0]._host.kernels if wrapped else kernels()
    shared = all(given is x for given in inputs)
    ids = [m.id if isinstance(m, AdapterLinear) else -1 for m in modules]
    if shared and ops is kernels() and all(_is_packed(base, x) for base in bases):
        results = ops.linear(x, [base.kernel for base in bases], ids, batch)
    elif shared and ops is not kernels() and batch is not None:
        results = ops.linear(x, bases, ids, batch)
    else:
        results = [
            m.compute(given) if isinstance(m, AdapterLinear) else m(given)
            for m, given in zip(modules, inputs, strict=True)
        ]
    return [
        m.finish(y, given, p) if isinstance(m, AdapterLinear) and p else y
        for m, y, given, p in zip(modules, results, inputs, parts, strict=True)
    ]


class AdapterNorm(AdapterModule):
    """A norm: a module that computes from each row's features with a weight for each feature."""

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, rows, dim]` or `[rows, dim]`; at a norm of each head also `[1, rows, heads, dim]`
        or `[1, heads, rows, dim]`. Returns the same."""
        result: Tensor = self.base(x)
        parts = self.parts()
        if any(part.weights.is_stream for part in parts):
            self._host.streams[self.path] = _rows(x)
            parts = [p for p in parts if p.weights.bias is not None or p.weights.override]
        if not parts:
            return result
        dim = self._row_dim(x)
        x, y = x.movedim(dim, 0), result.movedim(dim, 0)
        for start, end, weights, _ in parts:
            if weights.override is not None:
                y[start:end] = self._overridden(x[start:end], *weights.override)
        grouped.add_(
            y,
            [
                VectorPart(start, end, weights.bias, factor)
                for start, end, weights, factor in parts
                if weights.bias is not None
            ],
        )
        return result

    def _overridden(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By the base's own formula, which knows an epsilon and whether the weight is around 0."""
        own = dict(self.base.named_parameters(recurse=False))
        given: dict[str, Any] = {"weight": weight.to(own["weight"].dtype)}
        if "bias" in own:
            given["bias"] = None if bias is None else bias.to(own["bias"].dtype)
        normed: Tensor = functional_call(self.base, given, (x,))
        return normed

    def _row_dim(self, x: Tensor) -> int:
        """The dimension of x that counts the batch's rows.

        Heads may stand before or behind it. As many rows as heads are told apart by memory: the
        projection before wrote a row's heads together, so the rows have the larger stride.
        """
        num_rows = self._host.num_rows
        dims = [dim for dim in range(x.dim() - 1) if x.shape[dim] == num_rows]
        if not dims:
            raise RuntimeError(
                f"{self.path}: no dimension of {tuple(x.shape)} counts {num_rows} rows"
            )
        return max(dims, key=x.stride)


class AdapterEmbedding(AdapterModule):
    """An embedding; the input embedding with the batch's virtual tokens in their rows.

    Attributes:
        scale: what the base multiplies the rows of its weight with.
    """

    def __init__(self, base: nn.Module, path: str, host: AdapterHost, is_input: bool) -> None:
        super().__init__(base, path, host)
        self.is_input = is_input
        scale = getattr(base, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            assert isinstance(base.weight, Tensor)
            scale = scale.to(base.weight.dtype).item()
        self.scale: float = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: `[1, rows]`; returns `[1, rows, dim]`."""
        hidden: Tensor = self.base(token_ids)
        parts = self.parts()
        if parts:
            self._add_parts(hidden.view(-1, hidden.shape[-1]), token_ids.view(-1), parts)
        if self.is_input:
            self._host.num_rows = token_ids.numel()
            for start, end, rows in self._host.batch.virtual:
                hidden[0, start:end] = rows
        return hidden

    def _add_parts(self, y: Tensor, token_ids: Tensor, parts: Sequence[Part]) -> None:
        low_rank: list[LowRankPart] = []
        rows: list[RowsPart] = []
        for start, end, weights, factor in parts:
            if weights.override is not None:
                weight, _ = weights.override
                y[start:end] = F.embedding(token_ids[start:end], weight) * self.scale
            if weights.low_rank is not None:
                update = weights.low_rank
                scale = factor * update.scale * self.scale
                low_rank.append(LowRankPart(start, end, update.a_t, update.b_t, scale))
            if weights.rows is not None:
                rows.append(RowsPart(start, end, *weights.rows, self.scale))
        grouped.add_low_rank_of_ids_(y, token_ids, low_rank)
        grouped.set_rows_of_ids_(y, token_ids, rows)


def _rows(x: Tensor) -> Tensor:
    """`x` as `[rows, features]`, sharing its memory."""
    return x.view(-1, x.shape[-1])


def attach(model: PreTrainedModel, base: BaseModel) -> AdapterHost:
    """Wrap every module of `model` that a primitive can act on, in place.

    Args:
        model: the model that `base` describes, not wrapped yet.
    """
    device = next(model.parameters()).device
    host = AdapterHost(device)
    if host.kernels is not None and (device.type != "cpu" or model.dtype == torch.float32):
        host.linears = {}
    embedding = model.get_input_embeddings()
    try:
        branches = {branch.path: branch for branch in branches_of(base)}
    except UnsupportedError:  # check_fits lets no bottleneck through then
        branches = {}
    for module in base.modules.values():
        surface = surface_of(module)
        wrapper: AdapterModule
        if module.module is embedding or surface == "embedding":
            is_input = module.module is embedding
            wrapper = AdapterEmbedding(module.module, module.path, host, is_input)
        elif surface == "linear":
            wrapper = AdapterLinear(module.module, module.path, host, module.is_output)
            if host.linears is not None:
                host.linears[module.path] = (module.in_features, module.out_features)
        elif surface == "norm":
            wrapper = AdapterNorm(module.module, module.path, host)
        elif module.path in branches:
            kind = AdapterBranch if branches[module.path].stream else AdapterAddNorm
            wrapper = kind(module.module, module.path, host)
        else:
            continue
        parent, _, name = module.path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner.base if isinstance(owner, AdapterModule) else owner, name, wrapper)
    return host
