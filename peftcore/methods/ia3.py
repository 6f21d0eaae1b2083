"""IA³ (Liu et al. 2022, arXiv:2205.05638): learned vectors rescale activations.

feed-forward module:  y = W (x ⊙ l) + b
any other module:     y = (W x + b) ⊙ l
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import nn

from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.errors import ConfigError
from peftcore.methods.targets import IA3_TARGETS, resolve_targets
from peftcore.parts import ModulePart
from peftcore.primitives import InputScale, OutputScale, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule


@register
@dataclass(config=strict, kw_only=True)
class IA3Config(AdapterConfig):
    """Config of an IA³ adapter; fields and defaults as PEFT's `IA3Config`."""

    peft_type: ClassVar[str] = "IA3"
    training_only: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights", "fan_in_fan_out"})
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    @field_validator("target_modules", "exclude_modules", "feedforward_modules", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    def targets(self, base: BaseModel) -> list[tuple[BaseModule, bool]]:
        """The modules of `base` that are rescaled, each with: is it feed-forward?"""
        target_modules, feedforward = self._patterns(base)
        matcher = PatternMatcher()
        found = resolve_targets(
            base,
            matcher,
            target_modules=target_modules,
            exclude_modules=self.exclude_modules,
            saved=self.saved_modules(base),
        )
        return [(m, self._is_feedforward(m.path, feedforward or [], matcher)) for m in found]

    def _patterns(self, base: BaseModel) -> tuple[list[str] | str | None, list[str] | str | None]:
        """`target_modules` and `feedforward_modules`, PEFT's defaults where neither is set."""
        if self.target_modules is not None:
            return self.target_modules, self.feedforward_modules
        if self.feedforward_modules is not None:
            raise ConfigError("target_modules", "not set, though feedforward_modules is")
        return IA3_TARGETS.get(base.model_type, (None, None))

    @staticmethod
    def _is_feedforward(path: str, patterns: list[str] | str, matcher: PatternMatcher) -> bool:
        if isinstance(patterns, str):
            return matcher.fullmatch(patterns, path, "feedforward_modules") is not None
        # PEFT matches these by a bare ending, not by whole path segments.
        return path.endswith(tuple(patterns))

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        for module, is_feedforward in self.targets(base):
            yield IA3Part(module, is_feedforward, self.init_ia3_weights)

    def completed(self, base: BaseModel) -> IA3Config:
        targets, feedforward = self._patterns(base)
        return dataclasses.replace(
            self, target_modules=targets, feedforward_modules=feedforward or []
        )


class IA3Part(ModulePart):
    """The scale vector of a linear module.

    Key: `ia3_l`, `[1, in]` for a feed-forward module, which scales its input, else `[out, 1]`.
    """

    def __init__(self, module: BaseModule, is_feedforward: bool, from_ones: bool) -> None:
        super().__init__(module)
        self.is_feedforward = is_feedforward
        self.from_ones = from_ones
        shape = (1, module.in_features) if is_feedforward else (module.out_features, 1)
        self.ia3_l = nn.Parameter(torch.randn(shape))

    def reset_parameters(self) -> None:
        if self.from_ones:
            nn.init.ones_(self.ia3_l)

    def primitives(self) -> list[Primitive]:
        scale = InputScale if self.is_feedforward else OutputScale
        return [scale(self.module.path, self.ia3_l.flatten())]
