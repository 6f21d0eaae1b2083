"""Bottleneck adapters as the files of AdapterHub's `adapters` 1.3.

    adapter_config.json    {config: {…}, hidden_size, model_class, model_name, model_type, name,
                           version}; PEFT's has the same name, and `peft_type` instead of these
    adapter.safetensors    keys hold the adapter's name: <place in the model>.adapters.<name>.…

A head, or whatever else the adapter trains whole (`modules_to_save`), lies beside them in two more
files: `adapterhub_heads`. Pickles are not read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from safetensors.torch import save
from torch import Tensor

from peftcore.checkpoint.adapterhub_heads import (
    HEAD_CONFIG_NAME,
    HEAD_NAME,
    PICKLED_HEAD_NAME,
    Head,
    read_head,
)
from peftcore.checkpoint.files import replace_file
from peftcore.checkpoint.reader import PICKLE, PREFIX, TensorReader
from peftcore.config import CONFIG_NAME, AdapterConfig
from peftcore.errors import CheckpointError, ConfigError, UnsupportedError
from peftcore.methods.bottleneck import BottleneckConfig

WEIGHTS_NAME = "adapter.safetensors"

#: Every file of an adapter, for a download.
FILES = (CONFIG_NAME, WEIGHTS_NAME, HEAD_CONFIG_NAME, HEAD_NAME)

#: What is written is what this version of `adapters` writes.
VERSION = "adapters.1.3.0"

#: Keys of `config` that mean something beside phm_layer or inv_adapter only, which are refused;
#: with the values that AdapterHub writes.
_IDLE: dict[str, Any] = {
    "inv_adapter_reduction_factor": None,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
_OFF: dict[str, Any] = {
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
}

#: Keys that AdapterHub gives no default.
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")

#: What the activations were called before configs had a version.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

#: Fields of ours that are not in `config`: key of the file → field.
_OUTER = {
    "name": "name",
    "model_type": "model_type",
    "model_class": "model_class",
    "hidden_size": "hidden_size",
    "model_name": "base_model_name_or_path",
}

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def is_adapterhub(raw: Mapping[str, Any]) -> bool:
    """Is this AdapterHub's form of a config, rather than PEFT's?"""
    return "peft_type" not in raw and "config" in raw and "model_type" in raw


def plain_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """AdapterHub's JSON as what `config_from_dict` takes in PEFT's form.

    Raises:
        ConfigError, UnsupportedError: another method than a bottleneck, or not a whole config.
    """
    given = raw["config"]
    if isinstance(given, str):
        given = dataclasses.asdict(BottleneckConfig.preset(given))
    if not isinstance(given, dict):
        raise ConfigError("config", f"an object is expected, not {type(given).__name__}")
    if given.get("architecture") is not None:
        raise UnsupportedError(
            "architecture",
            f"{given['architecture']!r}: of AdapterHub's methods only bottlenecks are supported; "
            "for others use PEFT's files",
        )
    for key in _REQUIRED:
        if key not in given:
            raise ConfigError(key, "required in an AdapterHub config")
    values = {"original_ln_before": False} | {
        key: value for key, value in given.items() if key not in _IDLE and key != "architecture"
    }
    if "version" not in raw and isinstance(old := values["non_linearity"], str):
        values["non_linearity"] = _OLD_ACTIVATIONS.get(old, old)
    values |= {field: raw[key] for key, field in _OUTER.items() if raw.get(key) is not None}
    if "name" not in raw:
        raise ConfigError("name", "required in an AdapterHub config")
    task = _task(raw.get("model_class"))
    if task == "CAUSAL_LM":
        values["task_type"] = task
    return {"peft_type": BottleneckConfig.peft_type, **values}


def _task(model_class: object) -> str | None:
    name = str(model_class)
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def config_json(config: BottleneckConfig) -> dict[str, Any]:
    """The config in AdapterHub's form."""
    values = dataclasses.asdict(config)
    inherited = {field.name for field in dataclasses.fields(AdapterConfig)}
    inner = {k: v for k, v in values.items() if k not in {*inherited, *_OUTER.values()}}
    outer = {key: values[field] for key, field in _OUTER.items()}
    return {
        **outer,
        "model_name": outer["model_name"] or "",
        "config": {**inner, **_OFF, **_IDLE},
        "version": VERSION,
    }


def write_config(folder: Path, config: BottleneckConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG_NAME, _json(config_json(config)))


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def write(folder: Path, config: BottleneckConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the adapter, and a head beside it where there is one.

    Args:
        tensors: by the keys of their parts; those of modules that are trained whole have PEFT's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {k: v.detach().cpu().clone() for k, v in tensors.items()}  # no two names of one memory
    head = {k.removeprefix(PREFIX): own.pop(k) for k in list(own) if k.startswith(PREFIX)}
    replace_file(folder / WEIGHTS_NAME, save(own))
    if head:
        replace_file(folder / HEAD_NAME, save(head))
        about = config_json(config) | {"config": None, "name": None}
        replace_file(folder / HEAD_CONFIG_NAME, _json(about))
    else:
        for name in (HEAD_NAME, HEAD_CONFIG_NAME):
            (folder / name).unlink(missing_ok=True)
    write_config(folder, config)


def joined(config: BottleneckConfig, head: Head) -> BottleneckConfig:
    """The config with what lies beside it: a head makes `modules_to_save` and `task_type`."""
    return dataclasses.replace(
        config,
        modules_to_save=head.modules(config.model_type),
        task_type=head.task or _task(config.model_class),
    )


def joined_tensors(body: TensorReader, head: Head) -> dict[str, Tensor]:
    """The adapter's tensors and the head's, which get PEFT's keys."""
    tensors = {key: body.peek(key) for key in body.keys()}  # noqa: SIM118  (not a mapping)
    return tensors | {PREFIX + key: tensor for key, tensor in head.tensors.items()}


def with_head(config: AdapterConfig, folder: Path) -> AdapterConfig:
    """The config, joined with the head that lies in the folder, if any. Raises as `read_head`, and
    CheckpointError where the head is a pickle."""
    assert isinstance(config, BottleneckConfig)
    head = _head_in(folder, config.model_type)
    return config if head is None else joined(config, head)


def _head_in(folder: Path, model_type: str | None) -> Head | None:
    path, about = folder / HEAD_NAME, folder / HEAD_CONFIG_NAME
    if path.is_file():
        given = about.read_bytes() if about.is_file() else None
        return read_head(TensorReader.from_file(path, HEAD_NAME), given, model_type)
    if (folder / PICKLED_HEAD_NAME).is_file():
        raise CheckpointError(PICKLED_HEAD_NAME, PICKLE)
    return None


def owns(config: AdapterConfig) -> TypeGuard[BottleneckConfig]:
    """Are the adapters of this config's method saved in AdapterHub's files?"""
    return isinstance(config, BottleneckConfig)


def read_tensors(folder: Path, config: BottleneckConfig) -> TensorReader:
    """The tensors by the keys of their parts. Raises CheckpointError, FileNotFoundError."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / "pytorch_adapter.bin").is_file():
            raise CheckpointError("pytorch_adapter.bin", PICKLE)
        raise FileNotFoundError(f"{folder}: holds no {WEIGHTS_NAME}")
    body = TensorReader.from_file(path)
    head = _head_in(folder, config.model_type)
    return body if head is None else TensorReader(joined_tensors(body, head))
