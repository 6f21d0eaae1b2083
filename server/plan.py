"""What a server with these settings would be, and whether it fits this machine, without loading it.

Sizes are reckoned from the checkpoint's header and from the model's config.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from transformers import AutoConfig

from peftcore.ops.cpu import kernels_status
from peftcore.quant import Quantization
from peftcore.sources.resolve import resolve_model
from server.adapters import registry
from server.build import SetupError, device_of, host_memory, kv_dtype_of
from server.settings import Settings

#: What Python, torch and transformers take before there is a model, in bytes, as README has it.
_IMPORTS = 400 << 20
#: Bytes of one weight of a linear layer, with its scale: of 128 weights, of 64 over nf4.
_BYTES: Mapping[Quantization, float] = {"none": 4, "int8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64}


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
    """
    device = device_of(settings)
    folder = resolve_model(settings.model)
    config = AutoConfig.from_pretrained(folder.path).get_text_config()
    weights = _weights(folder.path)
    base = _base_bytes(weights, settings.quantization)
    computed = torch.float32 if device.type == "cpu" else torch.bfloat16
    kv_dtype = kv_dtype_of(settings, device, settings.quantization, computed)
    position = _num_position_values(config) * kv_dtype.itemsize
    capacity = settings.kv_memory // (position * settings.block_size) * settings.block_size
    if capacity == 0:
        raise SetupError(f"--kv-memory: one block takes {position * settings.block_size} bytes")
    host = host_memory(settings, device)
    on_device = base + settings.kv_memory + settings.adapter_memory
    need = _IMPORTS + host + (on_device if device.type == "cpu" else 0)
    available = _available()
    limit = min(config.max_position_embeddings, capacity)
    verdict = "the system does not tell its memory" if available is None else _size(available)
    facts = {
        "model": f"{settings.served_model_name or folder.name} ({folder.path})",
        "quantization": settings.quantization,
        "device": str(device),
        "threads": str(settings.num_threads or torch.get_num_threads()),
        "kernels": kernels_status() if device.type == "cpu" else "torch",
        "base": f"{_size(base)} of weights",
        "KV cache": f"{_size(settings.kv_memory)}, {capacity} tokens",
        "context": f"{settings.max_model_len or limit} tokens",
        "adapters": f"{_size(settings.adapter_memory)}, and {_size(host)} of host memory",
        "data": _found(settings.data_dir.expanduser(), folder.name),
        "imports": f"about {_size(_IMPORTS)}",
        "RAM needed": f"{_size(need)} when all pools are full",
        "RAM available": verdict,
    }
    plan = Plan(facts, need, available)
    return Plan({**facts, "fits": "yes" if plan.fits else "no"}, need, available)


def _weights(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors, from the files' headers alone."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name[:2] != "__"}
    return shapes


def _base_bytes(shapes: Mapping[str, list[int]], quantization: Quantization) -> int:
    """Linear layers at their width, all else (embeddings, norms, biases) in float32."""
    total = 0.0
    for name, shape in shapes.items():
        is_linear = len(shape) == 2 and "embed" not in name and "lm_head" not in name
        size = torch.Size(shape).numel()
        total += size * (_BYTES[quantization] if is_linear else 4)
    return int(total)


def _num_position_values(config: Any) -> int:
    """Values that one position takes in the cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * heads * width * 2)


def _available() -> int | None:
    """Bytes of RAM that can be had, within the container's limit."""
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


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
