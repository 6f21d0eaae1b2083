"""What LoRA and its kin have in common: where they attach, and what is saved beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.config import AdapterConfig, PatternMatcher, strict
from peftcore.errors import ConfigError
from peftcore.methods.targets import LORA_TARGETS, resolve_targets
from peftcore.parts import Bias, ModulePart

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

# Far beyond any in use, and small enough that no factor made of them overflows.
Rank = Annotated[int, Field(gt=0, le=1 << 20)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=strict, kw_only=True)
class TargetedConfig(AdapterConfig):
    """A config that names linear modules, and maybe layers.

    A subclass may add the field `exclude_modules`.
    """

    #: `target_modules` where the config names none, by `model_type`.
    default_targets: ClassVar[Mapping[str, list[str]]] = LORA_TARGETS

    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    @field_validator("target_modules", "exclude_modules", mode="before", check_fields=False)
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    def __post_init__(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) not in (None, []):
                raise ConfigError(name, "cannot be combined with a target_modules that is a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern", "set, though layers_to_transform is not")

    def named_modules(
        self, base: BaseModel, matcher: PatternMatcher, embeddings: bool = False
    ) -> list[BaseModule]:
        """The modules that the config names. Raises as `resolve_targets`."""
        return resolve_targets(
            base,
            matcher,
            target_modules=self.target_modules or self.default_targets.get(base.model_type),
            exclude_modules=getattr(self, "exclude_modules", None),
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            embeddings=embeddings,
            saved=self.saved_modules(base),
        )

    def other_biases(self, base: BaseModel, targets: Collection[BaseModule]) -> Iterator[Bias]:
        """The parts that `bias="all"` adds: every other module's bias."""
        taken = {module.path for module in targets} | set(self.saved_modules(base))
        for module in base.modules.values():
            if module.path not in taken and module.bias() is not None:
                yield Bias(module)

    def completed(self, base: BaseModel) -> Self:
        targets = self.target_modules or self.default_targets.get(base.model_type)
        return dataclasses.replace(self, target_modules=targets)


class LowRankPart(ModulePart):
    """A part that may train the module's own bias beside its update.

    Key: `base_layer.bias` `[out]`, absolute values.
    """

    base_bias: nn.Parameter | None

    def __init__(self, module: BaseModule, dropout: float = 0.0, bias: str = "none") -> None:
        """`bias`: anything but "none" trains the module's."""
        super().__init__(module, dropout)
        trains = bias != "none" and module.bias() is not None
        self.register_parameter(
            "base_bias", nn.Parameter(torch.empty(module.out_features)) if trains else None
        )

    def reset_parameters(self) -> None:
        if self.base_bias is not None:
            self.base_bias.data = self.module.bias().clone()  # type: ignore[union-attr]

    def bias_change(self) -> Tensor | None:
        """What training changed of the module's bias; None where it is not trained."""
        if self.base_bias is None:
            return None
        own = self.module.bias()
        return None if own is None else self.base_bias - own

    def file_key(self, name: str) -> str:
        return super().file_key("base_layer.bias" if name == "base_bias" else name)

    def num_replaced(self) -> int:
        return 0 if self.base_bias is None else self.base_bias.numel()
