"""Adapter configs in PEFT's own JSON: one base class, one registry by `peft_type`.

Reading fails closed. Every key of a file is either a field that the method's math uses, a key that
is known to matter in training only, or at its neutral value; anything else is refused by name,
because serving an adapter with an ignored option serves another adapter.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
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

#: Patterns come from a client: all those of one adapter may take this long together, in seconds
#: of this thread's processor time.
PATTERN_SECONDS = 5.0

#: Longest pattern that is compiled, in characters.
MAX_PATTERN_LEN = 1 << 14

strict = ConfigDict(strict=True, extra="forbid", validate_assignment=False, allow_inf_nan=False)


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
        """The part of the config that decides what is computed: what a digest covers.

        A list holds alternatives, in whatever order PEFT wrote its set. A mapping holds patterns
        of which the first match wins: its order counts.
        """
        skip = self._inert | self.training_only
        return {
            k: sorted(set(v)) if isinstance(v, list) else v
            for k, v in self.to_dict().items()
            if k not in skip
        }

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
        field, *inner = [str(part) for part in first["loc"]] or ["config"]
        where = f" (at {'.'.join(inner)})" if inner else ""
        raise ConfigError(field, first["msg"] + where) from None


def config_from_json(text: str | bytes) -> AdapterConfig:
    """Parse a config's JSON text. Raises as `config_from_dict`, and ConfigError for bad JSON."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError("config", f"{len(text)} bytes, over the limit of {MAX_CONFIG_BYTES}")
    try:
        raw = json.loads(text, object_pairs_hook=_without_duplicates)
        json.dumps(raw, ensure_ascii=False).encode()  # names in it end up in answers: no surrogates
    except (ValueError, RecursionError) as exc:
        raise ConfigError("config", f"not valid JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise ConfigError("config", f"a JSON object is expected, not {type(raw).__name__}")
    return config_from_dict(raw)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} is given twice")
        values[key] = value
    return values


class PatternMatcher:
    """Matches the regular expressions of one adapter's config.

    They come from a client: what they take together is bounded, and they are forgotten with this
    object.
    """

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._seconds_left = PATTERN_SECONDS

    def fullmatch(self, pattern: str, text: str, field: str) -> regex.Match[str] | None:
        """`re.fullmatch`.

        Raises:
            ConfigError: `pattern`, which `field` holds, is not valid, or the time is up.
        """
        started = time.thread_time()
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = _compile(pattern, field)
        try:
            match = compiled.fullmatch(text, timeout=self._seconds_left)
        except TimeoutError:
            raise ConfigError(field, f"the pattern {pattern!r} takes too long to match") from None
        self._seconds_left -= time.thread_time() - started
        if self._seconds_left <= 0:
            raise ConfigError(field, "the patterns of this config take too long to match")
        return match


def _compile(pattern: str, field: str) -> regex.Pattern[str]:
    """A pattern for `re`, as PEFT's are, compiled for `regex`, which can time out.

    What only `regex` knows is refused: its recursive patterns take memory without bound.
    """
    if len(pattern) > MAX_PATTERN_LEN:
        raise ConfigError(field, f"a pattern is over {MAX_PATTERN_LEN} characters long")
    try:
        re.compile(pattern)
        return regex.compile(pattern, cache_pattern=False)
    except (re.error, regex.error, OverflowError) as exc:
        raise ConfigError(field, f"{pattern!r} is not a valid regular expression: {exc}") from None
    except RecursionError:
        raise ConfigError(field, "a pattern is nested too deeply") from None
