"""An adapter as PEFT's files: the keys of its tensors, and a folder that is written whole.

Knows parts, keys and folders; nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor

from peftcore.checkpoint import adapterhub_format
from peftcore.checkpoint.files import replace_file
from peftcore.checkpoint.reader import PICKLE, TensorReader
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, config_from_json
from peftcore.errors import CheckpointError, ConfigError
from peftcore.parts import Parts, Prompt

#: What a prompt's encoder needs to go on training; PEFT's own files hold its output only.
ENCODER_NAME = "prompt_encoder.safetensors"

#: What is downloaded of a repository: an adapter's files, and those of a tokenizer that grew.
_FILES = (
    *(WEIGHTS_NAME, *adapterhub_format.FILES, ENCODER_NAME),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)


def state_dict(parts: Parts) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, detached."""
    found: dict[str, Tensor] = {}
    for part in parts.all():
        for name, tensor in part.saved():
            found[part.file_key(name)] = tensor.detach()
    return found


def write(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Write both files; each is replaced whole. Bottlenecks are written in AdapterHub's."""
    if adapterhub_format.owns(config):
        adapterhub_format.write(folder, config, tensors)
        return
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    replace_file(folder / WEIGHTS_NAME, save(_apart(contiguous), metadata={"format": "pt"}))
    encoder = None if parts.prompt is None else parts.prompt.encoder_state()
    if encoder:
        replace_file(folder / ENCODER_NAME, save({k: v.cpu() for k, v in encoder.items()}))
    else:
        (folder / ENCODER_NAME).unlink(missing_ok=True)
    config.save_pretrained(folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory with one before (tied weights) copied."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def locate(name_or_path: str | Path, subfolder: str | None = None, **download: Any) -> Path:
    """The folder of an adapter: a local one, or a repository of the hub, downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        try:
            folder = Path(
                snapshot_download(
                    str(name_or_path),
                    allow_patterns=[f"*{n}" for n in _FILES],
                    **download,
                )
            )
        except Exception as exc:
            raise FileNotFoundError(
                f"{name_or_path}: no such folder, and not to be had from the hub: {exc}"
            ) from None
    return folder / subfolder if subfolder else folder


def read_config(folder: Path) -> AdapterConfig:
    """Raises ConfigError, and FileNotFoundError where the folder holds no adapter."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no {CONFIG_NAME}")
    config = config_from_json(path.read_bytes())
    return adapterhub_format.with_head(config, folder) if adapterhub_format.owns(config) else config


def read_tensors(folder: Path, config: AdapterConfig) -> TensorReader:
    """The tensors of an adapter of that config.

    Raises CheckpointError; a pickle is refused with what to do instead.
    """
    if adapterhub_format.owns(config):
        return adapterhub_format.read_tensors(folder, config)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError("adapter_model.bin", PICKLE)
        raise FileNotFoundError(f"{folder}: holds no {WEIGHTS_NAME} (pickles are not read)")
    return TensorReader.from_file(path)


def read_encoder(folder: Path, prompt: Prompt) -> None:
    """Load a prompt's encoder, to go on training it.

    Raises ConfigError where the folder has none: its output alone cannot be trained as before.
    """
    path = folder / ENCODER_NAME
    if not path.is_file():
        raise ConfigError(
            "inference_mode",
            f"{folder} holds the prompt encoder's output only, which cannot go on training: "
            f"load it without is_trainable, or save a checkpoint here, which adds {ENCODER_NAME}",
        )
    state = load_file(path)
    with torch.no_grad():
        prompt.load_state_dict(state)
