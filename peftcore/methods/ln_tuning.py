"""LN tuning (Zhao et al. 2023, arXiv:2312.11420): only the weights of the norms are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from peftcore.checkpoint.reader import PREFIX
from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.methods.targets import LN_TUNING_TARGETS, resolve_targets
from peftcore.parts import ModulePart, ReplacedModule

if TYPE_CHECKING:
    from peftcore.base import BaseModel


@register
@dataclass(config=strict, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """Config of an LN tuning adapter; fields and defaults as PEFT's `LNTuningConfig`."""

    peft_type: ClassVar[str] = "LN_TUNING"

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        for module in resolve_targets(
            base,
            PatternMatcher(),
            target_modules=self.target_modules or LN_TUNING_TARGETS.get(base.model_type),
            exclude_modules=self.exclude_modules,
            whole=True,
            saved=self.saved_modules(base),
        ):
            yield TunedNorm(module)

    def completed(self, base: BaseModel) -> Self:
        targets = self.target_modules or LN_TUNING_TARGETS.get(base.model_type)
        return dataclasses.replace(self, target_modules=targets)


class TunedNorm(ReplacedModule):
    """A trained copy of a norm; of another module where the config names one.

    Keys: `ln_tuning_layers.` before those of the module itself.
    """

    def file_key(self, name: str) -> str:
        name = name.removeprefix("copy.")
        return f"{PREFIX}{self.module.path}.ln_tuning_layers.{name}"
