"""What a server with these settings would be, and whether it fits this machine, without loading it.

Sizes are reckoned from the checkpoint's header and from the model's config.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from transformers import AutoConfig

from peftcore import ops
from peftcore.quant import Quantization
from peftcore.sources.resolve import resolve_model
from server.adapters import registry
from server.build import (
    SetupError,
    adapter_folders,
    dequantizes,
    device_of,
    host_memory,
    kv_dtype_of,
    kv_room,
    max_graph_rows,
    wants_graphs,
)
from server.memory import (
    TooLittleMemory,
    free_memory,
    graph_bytes,
    make_memory_plan,
    mebibytes,
    workspace_bytes,
)
from server.models.loader import generates, kept_quantization
from server.settings import Settings

#: What Python, torch and transformers take before there is a model, in bytes, as README has it.
_IMPORTS = 400 << 20
#: Bytes of one weight of a linear layer, with its scale: of 128 weights, of 64 over nf4.
_BYTES: Mapping[Quantization, float] = {"int8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Plan:
    """Lines for people, and the verdict.

    Attributes:
        need, available: bytes of RAM; `available` is None where the system does not tell.
    """

    facts: Mapping[str, str]
    need: int
    available: int | None

    @property
    def fits(self) -> bool:
        return self.available is None or self.need <= self.available

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.facts.items())


def make_plan(settings: Settings) -> Plan:
    """Find the model, which may download or convert it, and add up what serving it takes.

    Raises:
        ModelSourceError: the model cannot be had.
        SetupError: a setting does not fit.
        UnservableModel: the checkpoint is quantized in a way that is not served.
    """
    device = device_of(settings)
    preloaded = adapter_folders(settings)
    folder = resolve_model(settings.model)
    config = AutoConfig.from_pretrained(folder.path)
    stored = kept_quantization(folder.path, config)
    is_encoder = not generates(config)
    config = config.get_text_config()
    computed = torch.float32 if device.type == "cpu" else torch.bfloat16
    if stored is None:
        base = _base_bytes(_weights(folder.path), settings.quantization, computed)
    else:
        base = _stored_bytes(_tensors(folder.path), computed)
    quantization = stored or settings.quantization
    kv_dtype = kv_dtype_of(settings, device, quantization, computed, is_encoder=is_encoder)
    max_len = settings.max_model_len or config.max_position_embeddings
    try:
        memory = make_memory_plan(
            device,
            base=base,
            adapters=settings.adapter_memory,
            workspace=workspace_bytes(
                config,
                max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
                max_num_seqs=settings.max_num_seqs,
                max_model_len=max_len,
                dtype=computed,
                dequantizes=dequantizes(device),
            ),
            kv_memory=settings.kv_memory,
            is_loaded=False,
            graphs=graph_bytes(
                config,
                max_rows=max_graph_rows(settings),
                max_model_len=max_len,
                dtype=computed,
            )
            if wants_graphs(settings, device) and not is_encoder
            else 0,
        )
    except TooLittleMemory as exc:
        raise SetupError(str(exc)) from exc
    block = _num_position_values(config) * kv_dtype.itemsize * settings.block_size
    num_blocks, _ = kv_room(
        settings, memory.kv_cache, block, config.max_position_embeddings, is_encoder=is_encoder
    )
    if num_blocks == 0:
        raise SetupError(f"--kv-memory: one block takes {block} bytes")
    if is_encoder:  # of its fewer blocks what there are; a decoder's fill what was given
        memory = replace(memory, kv_cache=num_blocks * block)
    capacity = num_blocks * settings.block_size
    host = host_memory(settings, device)
    need = _IMPORTS + host + (memory.total if device.type == "cpu" else 0)
    available = free_memory(torch.device("cpu"))
    limit = min(config.max_position_embeddings, capacity)
    verdict = "the system does not tell its memory" if available is None else mebibytes(available)
    facts = {
        "model": f"{settings.served_model_name or folder.name} ({folder.path})",
        "quantization": quantization,
        "device": str(device),
        "threads": str(settings.num_threads or torch.get_num_threads()),
        "kernels": ops.status(device),
        "base": f"{mebibytes(base)} of weights",
        "KV cache": f"{mebibytes(memory.kv_cache)}, {capacity} tokens",
        "context": f"{settings.max_model_len or limit} tokens",
        "adapters": f"{mebibytes(settings.adapter_memory)}, and {mebibytes(host)} of host memory",
        "workspace": f"{mebibytes(memory.workspace)} for the largest step",
        "memory": str(memory),
        "data": _found(settings.data_dir.expanduser(), folder.name),
        "preloaded": ", ".join(path.name for path in preloaded) or "nothing",
        "imports": f"about {mebibytes(_IMPORTS)}",
        "RAM needed": f"{mebibytes(need)} when all pools are full",
        "RAM available": verdict,
    }
    plan = Plan(facts, need, available)
    return Plan({**facts, "fits": "yes" if plan.fits else "no"}, need, available)


def _tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Shapes and types of all tensors, from the files' headers alone."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        found |= {name: entry for name, entry in header.items() if name[:2] != "__"}
    return found


def _weights(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors."""
    return {name: entry["shape"] for name, entry in _tensors(folder).items()}


def _stored_bytes(tensors: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> int:
    """Of a checkpoint that bitsandbytes has quantized: codes as they are, their scales in float32,
    all else in `dtype`."""
    total = 0
    for name, entry in tensors.items():
        path, _, state = name.partition(".weight.")
        path = path.removesuffix(".weight").removesuffix(".SCB")
        is_coded = f"{path}.SCB" in tensors or f"{path}.weight.absmax" in tensors
        start, end = entry["data_offsets"]
        if state == "absmax" or name.endswith(".SCB"):
            total += torch.Size(entry["shape"]).numel() * 4
        elif name.endswith(".weight") and is_coded:
            total += end - start
        elif not state and not name.endswith(".weight_format"):
            total += torch.Size(entry["shape"]).numel() * dtype.itemsize
    return total


def _base_bytes(
    shapes: Mapping[str, list[int]], quantization: Quantization, dtype: torch.dtype
) -> int:
    """Linear layers at their width, all else (embeddings, norms, biases) in `dtype`."""
    total = 0.0
    for name, shape in shapes.items():
        is_linear = len(shape) == 2 and "embed" not in name and "lm_head" not in name
        size = torch.Size(shape).numel()
        total += size * (_BYTES.get(quantization, dtype.itemsize) if is_linear else dtype.itemsize)
    return int(total)


def _num_position_values(config: Any) -> int:
    """Values that one position takes in the cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * heads * width * 2)


def _found(data_dir: Path, base_name: str) -> str:
    """What the registries of this base's name hold. Nothing is created, locked or changed."""
    names = 0
    for path in data_dir.glob(f"{base_name.replace('/', '--')}-*/registry.sqlite"):
        engine = sa.create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
        try:
            with engine.connect() as connection:
                query = sa.select(sa.func.count()).select_from(registry.aliases)
                names += connection.scalar(query) or 0
        except sa.exc.DatabaseError as exc:
            raise SetupError(f"--data-dir: {path} cannot be read: {exc.__cause__}") from exc
        finally:
            engine.dispose()
    return f"{data_dir}, {names} adapters registered"
