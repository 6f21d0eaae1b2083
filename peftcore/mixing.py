"""New adapters out of several: weighted sums of LoRA and IA³ adapters, as PEFT's.

LoRA updates are combined either factor by factor (A with A, B with B, each by the root of its
weight), or as whole updates ΔW = s·BA that are factored again by a singular value decomposition
(`…svd`), or side by side (`cat`, exact). What is combined may be thinned out first:

    ties             TIES (Yadav et al. 2023, arXiv:2306.01708): keep the largest, elect signs
    dare_…           DARE (Yu et al. 2023, arXiv:2311.03099): keep some at random, rescaled
    magnitude_prune  keep the largest

Knows parts and tensors; nothing of models or files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from peftcore.config import AdapterConfig
from peftcore.errors import MixtureError
from peftcore.methods.ia3 import IA3Config, IA3Part
from peftcore.methods.lora import LoraConfig, LoraEmbeddingPart, LoraPart
from peftcore.parts import Parts

Sign = Literal["total", "frequency"]


class _Rule(NamedTuple):
    """How tensors are thinned out, and added up."""

    keep: Literal["all", "largest", "random"]
    elect_signs: bool


_RULES = {
    "linear": _Rule("all", False),
    "ties": _Rule("largest", True),
    "dare_linear": _Rule("random", False),
    "dare_ties": _Rule("random", True),
    "magnitude_prune": _Rule("largest", False),
}

COMBINATIONS = ("svd", "cat", *_RULES, *(f"{name}_svd" for name in _RULES if name != "linear"))


class Source(NamedTuple):
    """One of the adapters that are combined."""

    name: str
    config: AdapterConfig
    parts: Parts
    weight: float


@torch.no_grad()
def combine(
    sources: Sequence[Source],
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: Sign = "total",
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A config and the tensors, under the keys of PEFT's file, of the weighted sum.

    Args:
        sources: LoRA adapters, or IA³ adapters.
        combination_type: one of `COMBINATIONS`.
        svd_rank: rank of the result, where it is factored; by default the largest of the sources'.
        svd_clamp: factors are clamped to this quantile of their values, in [0, 1].
        density: share of the values that is kept, in [0, 1], where values are dropped.
        majority_sign_method: signs are elected by sum, or by count.

    Raises:
        MixtureError: adapters that cannot be combined like this; the message names the argument.
    """
    if not sources:
        raise MixtureError("adapters: name at least one")
    kinds = {type(source.config) for source in sources}
    if kinds == {IA3Config}:
        return _combine_ia3(sources)
    if kinds != {LoraConfig}:
        named = ", ".join(f"{s.name} ({s.config.peft_type})" for s in sources)
        raise MixtureError(f"adapters: only LORA, or only IA3, can be combined, not {named}")
    _check_lora(sources)
    if combination_type not in COMBINATIONS:
        raise MixtureError(
            f"combination_type: {combination_type!r} is not one of {', '.join(COMBINATIONS)}"
        )
    if len(sources) == 1:
        combination_type = "linear"
    factored = combination_type.endswith("svd")
    rule = _RULES.get(combination_type.removesuffix("_svd"), _RULES["linear"])
    if rule.keep != "all" and (density is None or not 0 <= density <= 1):
        raise MixtureError(f"density: a number in [0, 1] is required for {combination_type}")
    ranks = [_max_rank(source.config) for source in sources]
    if combination_type == "cat":
        rank = sum(ranks)
    elif factored:
        rank = svd_rank or max(ranks)
    elif len(set(ranks)) > 1:
        instead = "svd" if combination_type == "linear" else f"{combination_type}_svd"
        raise MixtureError(
            f"combination_type: {combination_type} needs adapters of one rank, not "
            f"{', '.join(map(str, ranks))}: use 'cat' or {instead!r}"
        )
    else:
        rank = ranks[0]

    tensors: dict[str, Tensor] = {}
    for factors in _by_module(sources).values():
        if combination_type == "cat":
            a = torch.cat([f.a * (f.weight * f.scale) for f in factors])
            b = torch.cat([f.b for f in factors], dim=1)
        elif factored:
            updates = [f.b @ f.a * f.scale for f in factors]
            update = _add_up(
                updates, [f.weight for f in factors], rule, density, majority_sign_method
            )
            a, b = _factor(update, rank, svd_clamp)
        else:
            # The sign stands on one side only.
            products = [f.weight * f.scale for f in factors]
            roots = [math.sqrt(abs(p)) for p in products]
            signed = [math.copysign(r, p) for r, p in zip(roots, products, strict=True)]
            a = _add_up([f.a for f in factors], signed, rule, density, majority_sign_method)
            b = _add_up([f.b for f in factors], roots, rule, density, majority_sign_method)
        key_a, key_b = factors[0].keys
        tensors[key_a], tensors[key_b] = _padded(a, rank, 0), _padded(b, rank, 1)
    configs = [cast(LoraConfig, source.config) for source in sources]
    config = dataclasses.replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,  # the weights are in the factors: the new scale is 1
        target_modules=_union([c.target_modules for c in configs]),
        rank_pattern={},
        alpha_pattern={},
    )
    return config, tensors


class _Factors(NamedTuple):
    """One source's update of one module: scale · b a.  a: `[rank, in]`, b: `[out, rank]`."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float
    keys: tuple[str, str]


def _check_lora(sources: Sequence[Source]) -> None:
    saved = 0
    for name, config, parts, _ in sources:
        assert isinstance(config, LoraConfig)
        for option, plain in [("use_dora", False), ("lora_bias", False), ("bias", "none")]:
            if getattr(config, option) != plain:
                raise MixtureError(f"adapters: {name!r} has {option}, which does not add up")
        if len(parts.modules) != len(list(_lora_parts(parts))):
            saved += 1
    if saved:
        raise MixtureError(
            "adapters: whole modules (modules_to_save, a classifier) or trained tokens do not add "
            "up: combine adapters without"
        )
    if len({isinstance(s.config.target_modules, str) for s in sources}) > 1:  # type: ignore[attr-defined]
        raise MixtureError("adapters: target_modules are lists in some and patterns in others")


def _lora_parts(parts: Parts) -> list[LoraPart | LoraEmbeddingPart]:
    return [p for p in parts.modules if isinstance(p, LoraPart | LoraEmbeddingPart)]


def _by_module(sources: Sequence[Source]) -> Mapping[str, list[_Factors]]:
    """The sources' updates by the path of their module, in the model's order of the first."""
    found: dict[str, list[_Factors]] = {}
    for source in sources:
        for part in _lora_parts(source.parts):
            if isinstance(part, LoraPart):
                a, b = part.lora_A.weight, part.lora_B.weight
                keys = part.file_key("lora_A.weight"), part.file_key("lora_B.weight")
            else:
                a, b = part.lora_embedding_A, part.lora_embedding_B
                keys = part.file_key("lora_embedding_A"), part.file_key("lora_embedding_B")
            factors = _Factors(a, b, part.scale, source.weight, keys)
            found.setdefault(part.module.path, []).append(factors)
    return found


def _max_rank(config: AdapterConfig) -> int:
    assert isinstance(config, LoraConfig)
    return max([config.r, *(config.rank_pattern or {}).values()])


def _union(targets: Sequence[list[str] | str | None]) -> list[str] | str:
    if isinstance(targets[0], str):
        return "|".join(f"({t})" for t in targets)
    return sorted({name for names in targets for name in names or ()})


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """`tensor` with zeros up to `rank` rows (dim 0) or columns (dim 1)."""
    missing = rank - tensor.shape[dim]
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if missing > 0 else tensor.clone()


def _add_up(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: _Rule,
    density: float | None,
    sign: Sign,
) -> Tensor:
    """The weighted sum of tensors of one shape, thinned out and with elected signs by the rule."""
    kept = torch.stack([_thinned(t, rule, density) for t in tensors])
    factors = torch.tensor(weights, dtype=kept.dtype, device=kept.device)
    weighted = kept * factors.view(-1, *[1] * (kept.dim() - 1))
    if not rule.elect_signs:
        return weighted.sum(0)
    votes = kept.sum(0) if sign == "total" else kept.sign().sum(0)
    elected = torch.where(votes >= 0, 1.0, -1.0)
    agrees = kept.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _thinned(tensor: Tensor, rule: _Rule, density: float | None) -> Tensor:
    if rule.keep == "all" or density is None or density >= 1:
        return tensor
    if rule.keep == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    flat = tensor.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view(tensor.shape)


def _factor(update: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """(a, b) with b a the best approximation of `update` of rank `rank`."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    if clamp is not None:
        high = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-high, high), a.clamp(-high, high)
    return a, b


def _combine_ia3(sources: Sequence[Source]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Σ weight · l, module by module."""
    found: dict[str, Tensor] = {}
    feedforward: dict[str, bool] = {}
    for source in sources:
        for part in source.parts.modules:
            if not isinstance(part, IA3Part):
                raise MixtureError("adapters: whole modules do not add up: combine without")
            path = part.module.path
            if feedforward.setdefault(path, part.is_feedforward) != part.is_feedforward:
                raise MixtureError(f"adapters: {path} is a feed-forward module in some only")
            key = part.file_key("ia3_l")
            term = part.ia3_l * source.weight
            found[key] = found[key] + term if key in found else term
    configs: list[Any] = [source.config for source in sources]
    config = dataclasses.replace(
        configs[0],
        target_modules=_union([c.target_modules for c in configs]),
        feedforward_modules=_union([c.feedforward_modules for c in configs]),
    )
    return config, found


__all__ = ["COMBINATIONS", "Source", "combine"]
