"""May this adapter be served on this base? Everything is checked before anything is kept."""

from __future__ import annotations

from pathlib import Path

import torch

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, config_from_json
from peftcore.packing import PackedAdapter, pack
from peftcore.program import AdapterProgram, compile_adapter


def validate(
    config_json: bytes, weights: Path, base: BaseModel
) -> tuple[AdapterConfig, AdapterProgram]:
    """Parse, check against the base, compile and fingerprint an adapter.

    Raises:
        AdapterError: the reason, with the field or the key at fault.
    """
    config = config_from_json(config_json)
    return config, compile_adapter(config, TensorReader.from_file(weights), base)


def load_packed(folder: Path, digest: str, base: BaseModel, dtype: torch.dtype) -> PackedAdapter:
    """Compile a stored adapter, known by `digest`, to its packed form. Its values were checked
    when it was admitted."""
    config = config_from_json((folder / CONFIG_NAME).read_bytes())
    tensors = TensorReader.from_file(folder / WEIGHTS_NAME, check_values=False)
    program = compile_adapter(config, tensors, base, digest=digest, check_values=False)
    return pack(program, dtype)
