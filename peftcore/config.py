"""Adapter configs in PEFT's own JSON: one base class, one registry by `peft_type`.

Reading fails closed. Every key of a file is either a field that the method's math uses, a key that
is known to matter in training only, or at its neutral value; anything else is refused by name,
because serving an adapter with an ignored option serves another adapter.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import regex
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from peftcore.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from peftcore.base import BaseModel
    from peftcore.checkpoint.reader import TensorReader
    from peftcore.program import Primitive

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

#: Longest JSON text of a config that is read, in bytes.
MAX_CONFIG_BYTES = 1 << 20

#: A pattern comes from a client: matching it may not take longer than this, in seconds.
PATTERN_TIMEOUT = 0.5

strict = ConfigDict(strict=True, extra="forbid", validate_assignment=False)


@dataclass(config=strict, kw_only=True)
class AdapterConfig(ABC):
    """What every method's config shares.

    Subclasses are dataclasses whose fields carry PEFT's names and defaults.
    """

    #: The value of `peft_type` that selects this class.
    peft_type: ClassVar[str]
    #: Keys of PEFT's JSON that change training and nothing that is served.
    training_only: ClassVar[frozenset[str]] = frozenset()
    #: Keys that change what the adapter computes and are not supported: key → what to do instead.
    refused: ClassVar[dict[str, str]] = {}

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    _inert: ClassVar[frozenset[str]] = frozenset(
        {
            "task_type",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "auto_mapping",
            "peft_version",
        }
    )

    @abstractmethod
    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        """Turn the trained weights into serving primitives.

        Args:
            base: what the adapter attaches to.
            tensors: the adapter's file; every key must be taken exactly once.

        Raises:
            ConfigError, UnsupportedError, CheckpointError: the adapter does not fit `base`.
        """

    def to_dict(self) -> dict[str, Any]:
        """The config in PEFT's JSON form, keys sorted."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["peft_type"] = self.peft_type
        return dict(sorted(values.items()))

    def canonical(self) -> dict[str, Any]:
        """The part of the config that decides what is computed: what a digest covers."""
        skip = self._inert | self.training_only
        return {k: v for k, v in self.to_dict().items() if k not in skip}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


_REGISTRY: dict[str, type[AdapterConfig]] = {}

C = TypeVar("C", bound=type)

#: Methods of PEFT's that cannot be served by adapter programs, or not yet: type → why, what to do.
_REFUSED_METHODS: dict[str, str] = {
    **dict.fromkeys(
        ["BOFT", "FOURIERFT", "WAVEFT", "C3A", "SHIRA", "RANDLORA", "HIRA", "SUPERTUNING", "OSF"],
        "its update has full rank: merge it into a base model of its own",
    ),
    "XLORA": "it routes between adapters at run time: name a mixture in the request instead",
    "POLY": "it routes between adapters at run time: name a mixture in the request instead",
    "ADAPTION_PROMPT": "it gates attention inside the layer: train prefix tuning instead",
    **dict.fromkeys(
        ["ADALORA", "LOHA", "LOKR", "VERA", "VBLORA", "HRA", "MISS", "DELORA", "GRALORA"],
        "it compiles to low-rank updates, which this version does for LORA only: "
        "convert it to LoRA",
    ),
    "OFT": "block-diagonal input rotations are not implemented in this version",
    "LN_TUNING": "per-row norm weights are not implemented in this version",
    "TRAINABLE_TOKENS": "row overrides of embeddings are not implemented in this version",
    "MULTITASK_PROMPT_TUNING": "multitask prompts are not implemented in this version: "
    "export the task's prompt as PROMPT_TUNING",
}


def register(cls: C) -> C:
    """Class decorator: enter a config class into the registry under its `peft_type`."""
    config_class = cast(type[AdapterConfig], cls)
    _REGISTRY[config_class.peft_type] = config_class
    return cls


def supported_methods() -> list[str]:
    """The `peft_type` values that can be read, sorted."""
    return sorted(_REGISTRY)


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def config_from_dict(raw: Mapping[str, Any]) -> AdapterConfig:
    """Build the method's config from PEFT's JSON.

    Raises:
        ConfigError: `peft_type` is missing or unknown, or a field has the wrong type.
        UnsupportedError: a method or an option that is known and not supported.
    """
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str):
        hint = ""
        if "config" in raw and "model_type" in raw:
            hint = "; this looks like an AdapterHub config, which is not supported yet"
        raise ConfigError("peft_type", f"required, one of {', '.join(supported_methods())}{hint}")
    cls = _REGISTRY.get(peft_type)
    if cls is None:
        supported = f"Supported methods: {', '.join(supported_methods())}"
        if peft_type in _REFUSED_METHODS:
            raise UnsupportedError(
                "peft_type",
                f"{peft_type} is not served: {_REFUSED_METHODS[peft_type]}. {supported}",
            )
        raise UnsupportedError(
            "peft_type", f"{peft_type!r} is not a method known here. {supported}"
        )

    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "peft_type" or (key in cls.training_only and key not in fields):
            continue
        if key in fields:
            values[key] = value
        elif _is_neutral(value):
            continue
        elif key in cls.refused:
            raise UnsupportedError(key, cls.refused[key])
        else:
            raise UnsupportedError(
                key, f"not known for {peft_type}, and set: it may change what the adapter computes"
            )
    try:
        return cls(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise cause from None
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise ConfigError(where, first["msg"]) from None


def config_from_json(text: str | bytes) -> AdapterConfig:
    """Parse a config's JSON text. Raises as `config_from_dict`, and ConfigError for bad JSON."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError("config", f"{len(text)} bytes, over the limit of {MAX_CONFIG_BYTES}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError("config", f"not valid JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise ConfigError("config", f"a JSON object is expected, not {type(raw).__name__}")
    return config_from_dict(raw)


def fullmatch(pattern: str, text: str, field: str) -> bool:
    """`re.fullmatch` for a pattern that a client sent: bounded in time, errors name `field`."""
    try:
        return regex.fullmatch(pattern, text, timeout=PATTERN_TIMEOUT) is not None
    except TimeoutError:
        raise ConfigError(field, f"the pattern {pattern!r} takes too long to match") from None
    except regex.error as exc:
        raise ConfigError(field, f"{pattern!r} is not a valid regular expression: {exc}") from None
