"""What LoHa and LoKr have in common: their config's fields, and how they drop out in training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from peftcore.config import PatternMatcher, strict
from peftcore.errors import UnsupportedError
from peftcore.methods.low_rank import Alpha, LowRankPart, Probability, Rank, TargetedConfig
from peftcore.methods.targets import lookup_pattern
from peftcore.primitives import LowRank

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule


@dataclass(config=strict, kw_only=True)
class LycorisConfig(TargetedConfig):
    """The fields of both."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        # Those of convolutions are here because nothing that is served has any.
        {"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
    )

    r: Rank = 8
    alpha: Alpha = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] | None = Field(default_factory=dict)

    def parts(self, base: BaseModel) -> Iterator[LycorisPart]:
        matcher = PatternMatcher()

        def value(path: str, field: str, default: float) -> float:
            return lookup_pattern(path, getattr(self, field), default, field, matcher)

        for module in self.named_modules(base, matcher):
            if module.kind == "conv1d":
                raise UnsupportedError(
                    "target_modules",
                    f"{module.path} is a Conv1D, on which PEFT has no {self.peft_type}: use LORA",
                )
            rank = int(value(module.path, "rank_pattern", self.r))
            yield self.part(module, rank, value(module.path, "alpha_pattern", self.alpha) / rank)

    @abstractmethod
    def part(self, module: BaseModule, rank: int, scale: float) -> LycorisPart:
        """The part at one of the targets."""


class LycorisPart(LowRankPart):
    """A product of small matrices that stands in the place of ΔW / scale."""

    def __init__(self, module: BaseModule, scale: float, config: LycorisConfig) -> None:
        super().__init__(module)
        self.scale = scale
        self.row_dropout = config.rank_dropout
        self.module_dropout = config.module_dropout
        self.rescales_rows = False

    @abstractmethod
    def primitives(self) -> list[LowRank]: ...

    def applied(self) -> list[LowRank]:
        """Under dropout, at random: nothing; or an update some of whose outputs are zero.

        PEFT draws the first number even where nothing drops out: other dropout then stays in step.
        """
        found = self.primitives()
        if not self.training:
            return found
        if float(torch.rand(1)) <= self.module_dropout:
            return []
        if self.row_dropout > 0:
            (update,) = found
            drop = (torch.rand(len(update.b)) > self.row_dropout).to(update.b)
            if self.rescales_rows:
                drop /= drop.mean()
            found = [LowRank(update.module, update.a, update.b * drop[:, None], update.scale)]
        return found
