"""What serving takes of a device's memory, by parts: base, KV cache, adapters, workspace, graphs.

Reckons with sizes alone. The workspace is what one step takes at most beside the pools, and is
reckoned, not measured: activations of one layer, or the logits and what sampling makes of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Of a GPU's free memory what `--kv-memory auto` counts on; the rest is for fragments of torch's
#: allocator, and for libraries that take memory past it.
_GPU_SHARE = 0.9
#: `--kv-memory auto` on a CPU, whose memory other programs share.
_CPU_KV_MEMORY = 1 << 30
#: Bytes that sampling takes for a logit: in float32 as it was, changed, as a probability, its
#: noise; and sorted, with an index of eight bytes.
_SAMPLED_LOGIT = 4 * 4 + 4 + 8

#: Parts of a single row's context in attention, at most, where it is longer than so many positions.
_ATTENTION_PARTS = 32
_PART_POSITIONS = 256


class TooLittleMemory(Exception):
    """The settings' pools do not fit; the message names the flags."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device.

    Attributes:
        available: what these parts may take together, as far as the system tells; of a GPU the
            share that is counted on.
    """

    device: torch.device
    base: int
    kv_cache: int
    adapters: int
    workspace: int
    available: int | None
    graphs: int = 0

    @property
    def total(self) -> int:
        return self.base + self.kv_cache + self.adapters + self.workspace + self.graphs

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        graphs = f", graphs {mebibytes(self.graphs)}" if self.graphs else ""
        parts = (
            f"base {mebibytes(self.base)}, KV cache {mebibytes(self.kv_cache)}, "
            f"adapters {mebibytes(self.adapters)}, workspace {mebibytes(self.workspace)}{graphs}: "
            f"{mebibytes(self.total)} on {self.device} when all pools are full"
        )
        return f"{parts}, of {'unknown' if self.available is None else mebibytes(self.available)}"


def make_memory_plan(
    device: torch.device,
    *,
    base: int,
    adapters: int,
    workspace: int,
    kv_memory: int | None,
    is_loaded: bool,
    graphs: int = 0,
) -> MemoryPlan:
    """Size the KV cache: `kv_memory`, or what is left on a GPU where that is None.

    Args:
        graphs: what captured steps keep; see `graph_bytes`.
        is_loaded: is the base in the device's memory already?

    Raises:
        TooLittleMemory: a GPU has no room for the pools. A CPU's are taken up as they are used, and
            may be too large: `fits` tells.
    """
    free = free_memory(device)
    room = None if free is None else free + (base if is_loaded else 0)
    if device.type == "cpu":
        kv_cache = _CPU_KV_MEMORY if kv_memory is None else kv_memory
        return MemoryPlan(device, base, kv_cache, adapters, workspace, room)
    assert room is not None
    counted = int(base + (room - base) * _GPU_SHARE)
    left = counted - base - adapters - workspace - graphs
    if left <= 0 or (kv_memory is not None and kv_memory > left):
        raise TooLittleMemory(
            f"--kv-memory {'auto' if kv_memory is None else mebibytes(kv_memory)}: of "
            f"{mebibytes(counted)} on {device} the base takes {mebibytes(base)}, --adapter-memory "
            f"{mebibytes(adapters)}, a step's workspace {mebibytes(workspace)} "
            f"(--max-num-batched-tokens) and --cuda-graphs {mebibytes(graphs)}, "
            f"which leaves {mebibytes(max(left, 0))}"
        )
    return MemoryPlan(
        device, base, left if kv_memory is None else kv_memory, adapters, workspace, counted, graphs
    )


def base_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def workspace_bytes(
    config: Any,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    dtype: torch.dtype,
    dequantizes: bool,
) -> int:
    """What the largest step takes beside the pools.

    Args:
        config: of the text model, as transformers has it.
        dtype: what the model computes in.
        dequantizes: is a whole quantized weight made a float one before it multiplies, and a
            sequence's keys and values gathered? Not by the CPU kernels.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    queries = heads * width
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    attention = max_num_batched_tokens * 2 * (queries + keys)  # q, k, v, and what comes out
    gathered = 2 * max_model_len * keys
    feed_forward = max_num_batched_tokens * 3 * inner  # gate, up, their product
    weight = hidden * max(inner, queries)
    layer = max_num_batched_tokens * 2 * hidden + max(  # the residual stream, and normed
        attention + (max(gathered, weight) if dequantizes else 0),
        feed_forward + (weight if dequantizes else 0),
    )
    rows = max(
        max_num_batched_tokens, max_num_seqs
    )  # all rows have logits where prompts are scored
    logits = config.vocab_size * (rows * dtype.itemsize + max_num_seqs * _SAMPLED_LOGIT)
    return max(layer * dtype.itemsize, logits)


def graph_bytes(config: Any, *, max_rows: int, max_model_len: int, dtype: torch.dtype) -> int:
    """What the captured steps keep for themselves: the largest step's activations, which all
    graphs share. What the driver keeps for each launch of a graph is not reckoned.

    Args:
        config, max_model_len, dtype: as for `workspace_bytes`.
        max_rows: of the largest graph.
    """
    step = workspace_bytes(
        config,
        max_num_batched_tokens=max_rows,
        max_num_seqs=0,  # sampling is no part of a graph
        max_model_len=0,
        dtype=dtype,
        dequantizes=True,
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Of attention in parts: sums of values and two numbers, for each head and part, in float32.
    parts = max_rows * config.num_attention_heads * _ATTENTION_PARTS * (width + 2) * 4
    return step + (parts if max_model_len > _PART_POSITIONS else 0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had: of a GPU, or of RAM within the container's limit."""
    if device.type != "cpu":
        torch.cuda.empty_cache()  # what torch keeps for itself is free for us
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control groups of the second version
        pass
    return min(found, default=None)


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
