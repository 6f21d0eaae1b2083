"""Which modules an adapter attaches to: PEFT's rules for `target_modules` and its companions.

The rules are those of PEFT 0.21's `check_target_module_exists`; tests compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peftcore.config import fullmatch
from peftcore.errors import ConfigError

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

_QV = ["q_proj", "v_proj"]

#: `target_modules` where a LoRA config names none, by `model_type` (PEFT's defaults).
LORA_TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], _QV
    ),
    **dict.fromkeys(["opt", "stablelm"], _QV),
}

#: `target_modules` and `feedforward_modules` where an IA³ config names none (PEFT's defaults).
IA3_TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "phi": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    **dict.fromkeys(["llama", "mistral"], (["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    **dict.fromkeys(
        ["gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"],
        (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
}

Patterns = str | Sequence[str]


def _listed(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def matches(path: str, patterns: Patterns, field: str) -> bool:
    """Does `path` match? A string is a regular expression for the whole path, a list holds names
    or path endings."""
    if isinstance(patterns, str):
        return fullmatch(patterns, path, field)
    return _listed(path, patterns)


def _layer_index(path: str, layers_pattern: Patterns | None) -> int | None:
    """The first numbered segment of `path` (after one of the names in `layers_pattern`)."""
    segments = path.split(".")
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for i in range(1, len(segments) - 1):
        before = i >= 2 if not names else segments[i - 1] in names
        if before and segments[i].isdecimal():
            return int(segments[i])
    return None


def resolve_targets(
    base: BaseModel,
    *,
    target_modules: Patterns | None,
    exclude_modules: Patterns | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Patterns | None = None,
) -> list[BaseModule]:
    """The modules of `base` that the config names, in the model's order.

    Raises:
        ConfigError: nothing matches, or a matched module is not one that an adapter attaches to.
    """
    if target_modules is None:
        raise ConfigError(
            "target_modules",
            f"not set, and there is no default for model type {base.model_type!r}: "
            "name the modules",
        )
    if target_modules == "all-linear":
        targets = [m for m in base.modules.values() if m.is_linear and not m.is_output]
    else:
        targets = [
            m for m in base.modules.values() if matches(m.path, target_modules, "target_modules")
        ]
    if exclude_modules:
        targets = [m for m in targets if not matches(m.path, exclude_modules, "exclude_modules")]
    if layers_to_transform not in (None, []) and not isinstance(target_modules, str):
        wanted = (
            {layers_to_transform}
            if isinstance(layers_to_transform, int)
            else set(layers_to_transform or ())
        )
        targets = [m for m in targets if _layer_index(m.path, layers_pattern) in wanted]
    if not targets:
        raise ConfigError(
            "target_modules",
            f"{target_modules!r} matches no module of the base model "
            f"(it has {', '.join(base.module_names())})",
        )
    for module in targets:
        if not module.is_linear:
            raise ConfigError(
                "target_modules",
                f"{module.path} is not a linear layer ({module.kind}): only those are served",
            )
    return targets


def lookup_pattern(
    path: str, patterns: Mapping[str, float] | None, default: float, field: str
) -> float:
    """The first entry of `rank_pattern` or `alpha_pattern` whose key matches `path`'s ending."""
    for key, value in (patterns or {}).items():
        if fullmatch(rf"(.*\.)?({key})", path, field):
            return value
    return default
