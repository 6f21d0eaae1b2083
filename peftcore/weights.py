"""An adapter's tensors by the keys of its file: taken from a model or a file, given to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.checkpoint import peft_format
from peftcore.checkpoint.reader import TensorReader
from peftcore.model import DOWNLOAD, PeftModel, only


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under the keys of its file.

    Args:
        state_dict, unwrap_compiled: accepted for PEFT's sake; the adapter's own are given.
    """
    model._known(adapter_name)
    return model._file_tensors(adapter_name, save_embedding_layers)


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors in an adapter's file, for `set_peft_model_state_dict`.

    Args:
        kwargs: of a download: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError, CheckpointError: no such adapter, or a pickle.
    """
    only(kwargs, DOWNLOAD)
    folder = peft_format.locate(model_id, subfolder, **kwargs)
    tensors = peft_format.read_tensors(folder, peft_format.read_config(folder))
    return {key: tensors.peek(key).to(device or "cpu") for key in tensors.keys()}  # noqa: SIM118


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    **kwargs: Any,
) -> None:
    """Give an adapter the tensors of a file. Raises CheckpointError; nothing is changed then.

    Args:
        kwargs: `low_cpu_mem_usage`, accepted for PEFT's sake.
    """
    only(kwargs, {"low_cpu_mem_usage"})
    model._known(adapter_name)
    tensors = TensorReader(peft_model_state_dict)
    with torch.device("meta"):
        check = model._saved_config(adapter_name).build(model.base)
    check.load(tensors)
    tensors.finish()
    model._parts[adapter_name].load(tensors.again())
