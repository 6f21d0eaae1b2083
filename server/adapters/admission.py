"""May this adapter be served on this base? Everything is checked before anything is kept."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from peftcore.checkpoint import adapterhub_format
from peftcore.checkpoint.adapterhub_heads import read_head
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, config_from_json
from peftcore.errors import ConfigError
from peftcore.memory import trim_malloc
from peftcore.packing import PackedAdapter, pack, read_packed, save_packed
from peftcore.program import AdapterProgram
from peftcore.tasks import Tasks
from server.adapters.store import PACKED_NAME


def validate(
    config_json: bytes, weights: Path, tasks: Tasks
) -> tuple[AdapterConfig, AdapterProgram]:
    """Parse, check against the base, compile and fingerprint an adapter.

    Raises:
        AdapterError: the reason, with the field or the key at fault.
    """
    config = config_from_json(config_json)
    return config, tasks.compile(config, TensorReader.from_file(weights))


def join_head(
    config_json: bytes, weights: Path, head: Path, head_config: bytes | None, folder: Path
) -> tuple[bytes, Path, bytes | None]:
    """One adapter of two files out of AdapterHub's four.

    Args:
        head: a safetensors file. head_config: its `head_config.json`, if there is one.
        folder: where the new weights are written.

    Returns:
        The config, the weights, and what the head's config says of its classes as `parse_labels`
        reads it.

    Raises:
        AdapterError: the reason, with the field or the key at fault.
    """
    config = config_from_json(config_json)
    if not adapterhub_format.owns(config):
        raise ConfigError("head", "goes with AdapterHub's adapters: PEFT's files hold their heads")
    read = read_head(TensorReader.from_file(head, "head"), head_config, config.model_type)
    tensors = adapterhub_format.joined_tensors(TensorReader.from_file(weights), read)
    path = folder / WEIGHTS_NAME
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    joined = json.dumps(adapterhub_format.joined(config, read).to_dict()).encode()
    if read.id2label is None and read.problem_type is None:
        return joined, path, None
    about = {"id2label": read.id2label, "problem_type": read.problem_type}
    return joined, path, json.dumps(about).encode()


class Packer:
    """Adapters' packed form, for one base and dtype, and the file in which it is kept.

    Compiling holds Python's lock, which the engine needs too, many times as long as reading.

    Args:
        dtype: as for `pack`.
        pin_memory: what is loaded is copied to a GPU.
    """

    def __init__(self, tasks: Tasks, dtype: torch.dtype, *, pin_memory: bool = False) -> None:
        self._tasks = tasks
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._made_for = f"{tasks.base.values()} {dtype}"

    def pack(self, program: AdapterProgram) -> PackedAdapter:
        return pack(program, self._dtype)

    def save(self, packed: PackedAdapter, folder: Path) -> None:
        """Keep it in the folder of the adapter's own files."""
        save_packed(packed, self._made_for, folder / PACKED_NAME)

    def load(self, folder: Path, digest: str) -> PackedAdapter:
        """The packed form of a stored adapter, known by `digest`: as it was kept, or compiled anew
        where it was not. Its values were checked when it was admitted."""
        packed = read_packed(folder / PACKED_NAME, digest, self._made_for)
        if packed is None:
            packed = self._compile(folder, digest)
            trim_malloc()  # what compiling took for a time lies between what stays
        return packed.pinned() if self._pin_memory else packed

    def _compile(self, folder: Path, digest: str) -> PackedAdapter:
        config = config_from_json((folder / CONFIG_NAME).read_bytes())
        tensors = TensorReader.from_file(folder / WEIGHTS_NAME, check_values=False)
        return self.pack(self._tasks.compile(config, tensors, digest=digest, check_values=False))
