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
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum, StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import regex
import torch
from pydantic import ConfigDict, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from peftcore.checkpoint.reader import PREFIX
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.parts import SHARED_PREFIX, ModulePart, Parts, Prompt, ReplacedModule, Shared
from peftcore.refusals import METHODS

if TYPE_CHECKING:
    from peftcore.base import BaseModel
    from peftcore.checkpoint.reader import TensorReader
    from peftcore.primitives import Primitive

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

#: Longest JSON text of a config that is read, in bytes.
MAX_CONFIG_BYTES = 1 << 20

#: Patterns come from a client: all those of one adapter may take this long together, in seconds
#: of this thread's processor time.
PATTERN_SECONDS = 5.0

#: Longest pattern that is compiled, in characters.
MAX_PATTERN_LEN = 1 << 14

#: Heads that a classification task trains whole, whatever `modules_to_save` says (PEFT's names).
HEAD_NAMES = ("classifier", "score")

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
    #: Is a classification task's head trained too, and whole?
    trains_head: ClassVar[bool] = True

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    modules_to_save: list[str] | None = None

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

    @field_validator("task_type", mode="before")
    @classmethod
    def _plain_task(cls, value: Any) -> Any:
        return value.value if isinstance(value, Enum) else value

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _plain_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    @property
    def is_prompt_learning(self) -> bool:
        """Does the method put virtual tokens before the sequence?"""
        return False

    @abstractmethod
    def parts(self, base: BaseModel) -> Iterator[ModulePart | Prompt | Shared]:
        """What an adapter of this config is on `base`, one part after another.

        Each is initialized by who takes it before the next is made: random numbers are then drawn
        in PEFT's order. `modules_to_save` are not among them; `build` adds those.

        Raises:
            ConfigError, UnsupportedError: the config does not fit `base`.
        """

    def build(self, base: BaseModel) -> Parts:
        """A new adapter on `base`, initialized as PEFT does; under the meta device an empty one.

        Raises as `parts`.
        """
        parts = Parts(embeddings=base.embeddings)
        for part in self.parts(base):
            if torch.get_default_device().type != "meta":
                part.reset_parameters()
            parts.add(part)
        for path in self.saved_modules(base):
            prefix = PREFIX if parts.prompt is None else SHARED_PREFIX
            parts.modules.append(ReplacedModule(base.modules[path], prefix))
        taken = set()
        for part in parts.modules:
            if part.module.path in taken:
                raise ConfigError(
                    "target_modules", f"{part.module.path} is also trained whole, or its tokens are"
                )
            taken.add(part.module.path)
        return parts

    def completed(self, base: BaseModel) -> Self:
        """This config with what PEFT fills in from the base (default targets, sizes)."""
        return self

    def trained(self, parts: Parts) -> Self:
        """This config as it is saved after training; AdaLoRA's ranks have changed then."""
        return self

    def as_saved(self, saved: AdapterConfig) -> Self:
        """This config with what training had changed when `saved`, a checkpoint's, was written."""
        return self

    def regularization(self, parts: Parts) -> Tensor | None:
        """What the method adds to the loss in training; None where it adds nothing."""
        return None

    def saved_modules(self, base: BaseModel) -> list[str]:
        """The paths of the modules that `modules_to_save` names, by their ending as in PEFT.

        Raises ConfigError where a name that is not a classification task's own matches nothing.
        """
        found: dict[str, None] = {}
        for name in self.modules_to_save or []:
            paths = [path for path in base.modules if path.endswith(name)]
            if not paths and name not in HEAD_NAMES:
                raise ConfigError(
                    "modules_to_save", f"{name!r} matches no module of the base model"
                )
            found |= dict.fromkeys(paths)
        return [p for p in found if not any(p.startswith(f"{q}.") for q in found)]

    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        """Turn the trained weights into serving primitives.

        Args:
            base: what the adapter attaches to.
            tensors: the adapter's file; every key must be taken exactly once.

        Raises:
            ConfigError, UnsupportedError, CheckpointError: the adapter does not fit `base`.
        """
        with torch.device("meta"):
            parts = self.build(base)
        for part in parts.all():
            part.requires_grad_(False)
        parts.load(tensors)
        return parts.primitives()

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

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, subfolder: str | None = None, **download: Any
    ) -> AdapterConfig:
        """The config in a folder or a repository of the hub. Raises as `config_from_json`.

        Args:
            download: of the hub: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        from peftcore.checkpoint.peft_format import locate, read_config

        return read_config(locate(name_or_path, subfolder, **download))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


_REGISTRY: dict[str, type[AdapterConfig]] = {}

C = TypeVar("C", bound=type)


def register(cls: C) -> C:
    """Class decorator: enter a config class into the registry under its `peft_type`.

    Its constructor then takes every option of PEFT's: those that change nothing that is computed
    here, and those at a value that does nothing, are left out, the others are refused by name.
    """
    config_class = cast(type[AdapterConfig], cls)
    _REGISTRY[config_class.peft_type] = config_class
    changed: Any = cls
    made = changed.__init__

    @wraps(made)
    def __init__(self: Any, /, **options: Any) -> None:
        """Raises ConfigError, UnsupportedError."""
        try:
            made(self, **_own_options(config_class, options))
        except ValidationError as exc:
            raise _explained(exc) from None

    changed.__init__ = __init__
    return cls


def _own_options(cls: type[AdapterConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields of the class. Raises UnsupportedError for one that is not."""
    fields = {f.name for f in dataclasses.fields(cls)}
    own: dict[str, Any] = {}
    for name, value in options.items():
        if name in fields:
            own[name] = value
        elif name == "peft_type":
            if value != cls.peft_type:
                raise ConfigError("peft_type", f"{value!r}, where {cls.peft_type} is made")
        elif name in cls.training_only or _is_neutral(value):
            continue
        elif name in cls.refused:
            raise UnsupportedError(name, cls.refused[name])
        else:
            near = get_close_matches(name, fields, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UnsupportedError(
                name,
                f"not known for {cls.peft_type}, and set: it may change what the adapter computes"
                f"{hint}",
            )
    return own


def _explained(error: ValidationError) -> ConfigError:
    """The first of pydantic's complaints, under the field's name."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    field, *inner = [str(part) for part in first["loc"]] or ["config"]
    where = f" (at {'.'.join(inner)})" if inner else ""
    return ConfigError(field, first["msg"] + where)


def supported_methods() -> list[str]:
    """The `peft_type` values that can be read, sorted."""
    return sorted(_REGISTRY)


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def config_from_dict(raw: Mapping[str, Any]) -> AdapterConfig:
    """Build the method's config from PEFT's JSON, or AdapterHub's.

    Raises:
        ConfigError: `peft_type` is missing or unknown, or a field has the wrong type.
        UnsupportedError: a method or an option that is known and not supported.
    """
    from peftcore.checkpoint import adapterhub_format

    if adapterhub_format.is_adapterhub(raw):
        raw = adapterhub_format.plain_config(raw)
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str):
        raise ConfigError("peft_type", f"required, one of {', '.join(supported_methods())}")
    cls = _REGISTRY.get(peft_type)
    if cls is None:
        supported = f"Supported methods: {', '.join(supported_methods())}"
        if peft_type in METHODS:
            raise UnsupportedError(
                "peft_type", f"{peft_type} is not supported: {METHODS[peft_type]}. {supported}"
            )
        raise UnsupportedError(
            "peft_type", f"{peft_type!r} is not a method known here. {supported}"
        )

    return cls(**raw)


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


class PeftType(StrEnum):
    """The methods by PEFT's names, and one more."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    VERA = "VERA"
    IA3 = "IA3"
    OFT = "OFT"
    LN_TUNING = "LN_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    BOTTLENECK = "BOTTLENECK"


class TaskType(StrEnum):
    """PEFT's tasks. The last two are refused where a model is made, with what to do instead."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    QUESTION_ANS = "QUESTION_ANS"


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
