"""IA³ (Liu et al. 2022, arXiv:2205.05638): learned vectors rescale activations.

feed-forward module:  y = W (x ⊙ l) + b
any other module:     y = (W x + b) ⊙ l
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import PREFIX, TensorReader
from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.errors import ConfigError
from peftcore.methods.targets import IA3_TARGETS, resolve_targets
from peftcore.methods.training import AdapterLayer, LayerAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftcore.base import BaseModel, BaseModule
    from peftcore.program import Primitive


@register
@dataclass(config=strict, kw_only=True)
class IA3Config(AdapterConfig):
    """Config of an IA³ adapter; fields and defaults as PEFT's `IA3Config`."""

    peft_type: ClassVar[str] = "IA3"
    training_only: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights", "fan_in_fan_out"})
    refused: ClassVar[dict[str, str]] = {
        "modules_to_save": "full copies of modules are not served yet: train without it",
    }

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
            base, matcher, target_modules=target_modules, exclude_modules=self.exclude_modules
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

    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        from peftcore.program import InputScale, OutputScale

        primitives: list[Primitive] = []
        for module, is_feedforward in self.targets(base):
            key = f"{PREFIX}{module.path}.ia3_l"
            why = f"target_modules names {module.path}"
            if is_feedforward:
                v = tensors.take(key, (1, module.in_features), f"{why}, a feed-forward module")
                primitives.append(InputScale(module.path, v.flatten()))
            else:
                v = tensors.take(key, (module.out_features, 1), why)
                primitives.append(OutputScale(module.path, v.flatten()))
        return primitives

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> LayerAdapter:
        """A new adapter on `model`. See `peftcore.methods.training.Trainable`."""
        layers: dict[str, AdapterLayer] = {
            module.path: IA3Layer(module, is_feedforward, self.init_ia3_weights)
            for module, is_feedforward in self.targets(base)
        }
        targets, feedforward = self._patterns(base)
        config = dataclasses.replace(
            self, target_modules=targets, feedforward_modules=feedforward or []
        )
        return LayerAdapter(model, config, layers)


class IA3Layer(AdapterLayer):
    """A linear module with its scale vector in training, float32 whatever the base computes in."""

    def __init__(self, module: BaseModule, is_feedforward: bool, from_ones: bool) -> None:
        super().__init__(module.module)
        self.is_feedforward = is_feedforward
        shape = (1, module.in_features) if is_feedforward else (module.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape) if from_ones else torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        v = self.ia3_l.flatten()
        if self.is_feedforward:
            return self.base_layer((x * v).to(x.dtype))
        y = self.base_layer(x)
        return (y * v).to(y.dtype)
