"""Decode steps as captured graphs: the launches of a step without Python, from memory that stays.

A step of single rows makes the same launches whatever its sequences and adapters, if its numbers
lie in buffers that do not move: token ids, positions and slots here, block tables in the
attention's plan, adapters in the kernels' batch. A graph is captured for some numbers of rows, each
with adapters and without; a step takes the next larger one. Rows that are left over have no slot
and no sequence: they write nothing, and attend to nothing.

What a graph cannot do is computed eagerly: prompts, pooling, an adapter with something that the
kernels leave to torch or that scales inputs, more work of adapters than `_capacity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peftcore.layers import AdapterBatch, Segment, kernel_segments
from peftcore.ops import uses_triton
from peftcore.upload import staging
from server.engine.scheduler import Batch, Chunk
from server.engine.step_inputs import chunk_rows, write_rows
from server.models.attention import NAME
from server.models.context import ForwardContext, forward_context
from server.models.kv_pool import KVPool
from server.models.loader import LoadedModel

#: Slot of a row whose keys and values nobody wants.
_NOWHERE = -1


class Captured(NamedTuple):
    """A function's launches. `replay` queues them again, and `output` holds their result."""

    output: Tensor
    replay: Callable[[], None]


class Capture(Protocol):
    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        """The launches of `function`, which reads and writes memory that stays where it is."""
        ...


class CudaCapture:
    """CUDA graphs, all with one pool of memory: one runs at a time, its output is read at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        # What is made at a first call (compiled kernels, libraries' workspaces) is no launch.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters: their calls are none of this capture's.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        self._pool = graph.pool()
        return Captured(output, graph.replay)


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured step of `num_rows` rows, and what is written before it is replayed.

    plan: `peftcore.ops.triton.attention.Plan`. adapters: `peftcore.ops.triton.Batch`, or None.
    """

    num_rows: int
    plan: Any
    adapters: Any
    captured: Captured


class StepGraphs:
    """The graphs of one resident model.

    Args:
        max_rows: of the largest graph.
        max_model_len: positions of the longest sequence.

    Attributes:
        num_rows: of which there are graphs, ascending.
        num_replays: steps so far that a graph has computed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pool: KVPool,
        capture: Capture,
        *,
        max_rows: int,
        max_model_len: int,
    ) -> None:
        """Captures all graphs. Raises whatever a model does that cannot be captured."""
        if reason := unfit(loaded):
            raise ValueError(reason)
        self.num_rows = graph_sizes(max_rows)
        self.num_replays = 0
        self._loaded = loaded
        self._pool = pool
        self._max_model_len = max_model_len
        self._capture_all(capture)

    @torch.inference_mode()
    def _capture_all(self, capture: Capture) -> None:
        # Token ids, positions and slots of all graphs: each reads the first of each.
        shape = (3, self.num_rows[-1])
        self._rows = torch.zeros(shape, dtype=torch.int64, device=self._loaded.device)
        self._rows[2] = _NOWHERE
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        for n in reversed(self.num_rows):  # the largest makes room for all
            plan = self._plan(n)
            for with_adapters in (True, False):
                self._graphs[n, with_adapters] = self._captured(capture, n, plan, with_adapters)

    def _plan(self, num_rows: int) -> Any:
        from peftcore.ops.triton import attention  # imports triton

        blocks = -(-self._max_model_len // self._pool.block_size)
        capacity = attention.Capacity(num_rows, 0, num_rows * blocks, self._max_model_len)
        return attention.Plan(capacity, self._loaded.device)

    def _captured(self, capture: Capture, n: int, plan: Any, with_adapters: bool) -> _Graph:
        model, host, adapters = self._loaded.model, self._loaded.host, None
        if with_adapters:
            adapters = host.kernels.Batch(
                [], _capacity(n), self._loaded.device, may_scale_inputs=False
            )
        ids, positions, slots = (row[:n] for row in self._rows)

        def step() -> Tensor:
            context = ForwardContext(self._pool, slots, (), shared={"plan": plan})
            with forward_context(context):
                found = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            logits: Tensor = found.logits[0]
            return logits

        host.set_kernel_batch(adapters)
        try:
            return _Graph(n, plan, adapters, capture(step))
        finally:
            host.batch = AdapterBatch()

    def execute(self, batch: Batch, adapters: AdapterBatch) -> Tensor | None:
        """The logits `[chunks, vocab]` of a step, until the next one; None where it is to be
        computed eagerly. Called in inference mode."""
        n = len(batch.chunks)
        if n > self.num_rows[-1] or not all(map(_is_decode, batch.chunks)):
            return None
        if not all(map(_is_kernels_alone, adapters.tokens)):
            return None
        given = kernel_segments(adapters.tokens)
        size = next(size for size in self.num_rows if size >= n)
        graph = self._graphs[size, bool(given)]
        if given and not graph.adapters.offer_(given):
            return None
        self._write(batch, graph)
        graph.captured.replay()
        self.num_replays += 1
        return graph.captured.output[:n]

    def _write(self, batch: Batch, graph: _Graph) -> None:
        """The batch's rows, the others empty, and its block tables."""
        host = staging(self._rows.numel(), torch.int64, self._rows.device).view(self._rows.shape)
        host[:2] = 0
        host[2] = _NOWHERE
        write_rows(batch, self._pool.block_size, host[:, : len(batch.chunks)])
        self._rows.copy_(host, non_blocking=True)
        graph.plan.update_(chunk_rows(batch, self._pool.block_size))


def graph_sizes(max_rows: int) -> list[int]:
    """For how many rows there are graphs: 1, 2, 4, 8, then every eighth, and the most."""
    sizes = [n for n in (1, 2, 4, *range(8, max_rows, 8)) if n < max_rows]
    return [*sizes, max_rows]


def unfit(loaded: LoadedModel) -> str | None:
    """Why no step of this model can be captured; None where one may be."""
    if loaded.is_encoder:
        return "an encoder does not decode"
    if not uses_triton(loaded.device):
        return f"there are no Triton kernels for {loaded.device}"
    if loaded.model.config._attn_implementation != NAME:
        return "torch attends, whose launches differ from step to step"
    return None


def _is_decode(chunk: Chunk) -> bool:
    """One row, of which a token is sampled and nothing else wanted?"""
    return (
        chunk.num_tokens == chunk.num_outputs == 1
        and chunk.samples
        and chunk.write_prefix_from is None
        and chunk.start >= chunk.seq.num_virtual_tokens
    )


def _is_kernels_alone(segment: Segment) -> bool:
    """Do the kernels compute all that the adapter does to a row behind its virtual ones?"""
    return not segment.adapter.modules


def _capacity(num_rows: int) -> Any:
    """What of adapters a graph has room for: mixtures of two on all rows, rank 64 on all, or more
    on fewer."""
    from peftcore.ops.triton import Capacity

    return Capacity(
        segments=2 * num_rows + 8,
        blocks=num_rows + 8,
        entries=2 * num_rows + 8,
        items=4 * num_rows + 32,
    )


__all__ = ["Capture", "Captured", "CudaCapture", "StepGraphs", "graph_sizes", "unfit"]
