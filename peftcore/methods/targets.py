"""Which modules an adapter attaches to: PEFT's rules for `target_modules` and its companions.

The rules are those of PEFT 0.21's `check_target_module_exists`; tests compare with it.
The patterns come from a client, so they are matched by one `PatternMatcher` an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from peftcore.config import PatternMatcher
from peftcore.errors import ConfigError

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

_QV = ["q_proj", "v_proj"]
_BERT_QV = ["query", "value"]

#: `target_modules` where a config of a low-rank method names none, by `model_type` (PEFT's).
LORA_TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], _QV
    ),
    **dict.fromkeys(["opt", "stablelm"], _QV),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra"], _BERT_QV),
}

#: The same for AdaLoRA.
ADALORA_TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bert": _BERT_QV,
    "roberta": ["query", "key", "value", "dense"],
    **dict.fromkeys(["llama", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], _QV),
}

#: The same for VeRA.
VERA_TARGETS: dict[str, list[str]] = {**LORA_TARGETS, "phi": _QV}

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
    **dict.fromkeys(["bert", "roberta"], (["key", "value", "output.dense"], ["output.dense"])),
}

_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
_QWEN_NORMS = ["post_attention_layernorm"]
_GEMMA_NORMS = [*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"]

#: `target_modules` where an LN tuning config names none (PEFT's defaults).
LN_TUNING_TARGETS: dict[str, list[str]] = {
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "phi": ["input_layernorm", "final_layernorm"],
    **dict.fromkeys(["llama", "mistral", "gemma"], _NORMS),
    **dict.fromkeys(["gemma2", "gemma3_text"], _GEMMA_NORMS),
    **dict.fromkeys(["qwen2", "qwen3"], _QWEN_NORMS),
}

Patterns = str | Sequence[str]


def _test(patterns: Patterns, field: str, matcher: PatternMatcher) -> Callable[[str], bool]:
    """Does a path match? A string is a regular expression for the whole path, a list holds paths
    or their endings."""
    if isinstance(patterns, str):
        return lambda path: matcher.fullmatch(patterns, path, field) is not None
    endings = tuple(f".{name}" for name in patterns)
    return lambda path: f".{path}".endswith(endings)


def _in_layers(
    path: str, wanted: Sequence[int] | int, layers_pattern: Patterns | None, matcher: PatternMatcher
) -> bool:
    """Is `path` in one of the layers `wanted`?

    A layer's number is the first after one of the names in `layers_pattern`, where there are none
    the first after at least two names.
    """
    if layers_pattern:
        names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        before = rf"(?:.*?\.)?(?:{'|'.join(names)})"
    else:
        before = r".*?\.[^.]*"
    match = matcher.fullmatch(rf"{before}\.(?P<layer>\d+)\..*", path, "layers_pattern")
    if match is None:
        return False
    layer = int(match["layer"])
    return layer == wanted if isinstance(wanted, int) else layer in wanted


def resolve_targets(
    base: BaseModel,
    matcher: PatternMatcher,
    *,
    target_modules: Patterns | None,
    exclude_modules: Patterns | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Patterns | None = None,
    embeddings: bool = False,
    whole: bool = False,
    saved: Sequence[str] = (),
) -> list[BaseModule]:
    """The modules of `base` that the config names, in the model's order.

    Args:
        embeddings: may embeddings be named too?
        whole: may any module be named that has parameters, and no modules in it?
        saved: modules that are trained whole; neither they nor what is in them is targeted.

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
        targets = [m for m in base.modules.values() if m.is_linear and not m.is_head]
    else:
        is_target = _test(target_modules, "target_modules", matcher)
        targets = [m for m in base.modules.values() if is_target(m.path)]
    if exclude_modules:
        is_excluded = _test(exclude_modules, "exclude_modules", matcher)
        targets = [m for m in targets if not is_excluded(m.path)]
    if layers_to_transform is not None and layers_to_transform != []:
        # A module that is named by its whole path is meant, in whatever layer.
        targets = [
            m
            for m in targets
            if m.path in target_modules
            or _in_layers(m.path, layers_to_transform, layers_pattern, matcher)
        ]
    targets = [
        m for m in targets if not any(m.path == p or m.path.startswith(f"{p}.") for p in saved)
    ]
    if not targets:
        raise ConfigError(
            "target_modules",
            f"{target_modules!r} matches no module of the base model "
            f"(it has {', '.join(base.module_names())})",
        )
    for module in targets:
        if whole:
            _check_whole(module)
        elif not module.is_linear and not (embeddings and module.kind == "embedding"):
            raise ConfigError(
                "target_modules",
                f"{module.path} is not a linear layer ({module.kind}): only those are served",
            )
    return targets


def _check_whole(module: BaseModule) -> None:
    if next(module.module.children(), None) is not None:
        raise ConfigError("target_modules", f"{module.path} holds other modules: name those")
    if next(module.module.parameters(), None) is None:
        raise ConfigError("target_modules", f"{module.path} has no parameters to train")


def lookup_pattern(
    path: str,
    patterns: Mapping[str, float] | None,
    default: float,
    field: str,
    matcher: PatternMatcher,
) -> float:
    """The first entry of `rank_pattern` or `alpha_pattern` whose key matches `path`'s ending."""
    for key, value in (patterns or {}).items():
        if matcher.fullmatch(rf"(.*\.)?({key})", path, field):
            return value
    return default
