"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): vectors around a random pair of matrices.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ (A x))

A and B are drawn once, are not trained, and are shared by all modules: each takes as many columns
of A and rows of B as it has inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import PatternMatcher, register, strict
from peftcore.methods.low_rank import LowRankPart, Probability, Rank, TargetedConfig
from peftcore.methods.targets import VERA_TARGETS
from peftcore.parts import ModulePart, Shared
from peftcore.primitives import BiasDelta, LowRank, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule


@register
@dataclass(config=strict, kw_only=True)
class VeraConfig(TargetedConfig):
    """Config of a VeRA adapter; fields and defaults as PEFT's `VeraConfig`."""

    peft_type: ClassVar[str] = "VERA"
    default_targets = VERA_TARGETS
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"}
    )

    r: Rank = 256
    #: What a generator takes as a seed.
    projection_prng_key: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    save_projection: bool = True
    vera_dropout: Probability = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True

    def parts(self, base: BaseModel) -> Iterator[ModulePart | Shared]:
        targets = self.named_modules(base, PatternMatcher())
        projection = VeraProjection(
            max(module.in_features for module in targets),
            max(module.out_features for module in targets),
            self,
        )
        yield projection
        for module in targets:
            yield VeraPart(module, projection, self)
        if self.bias == "all":
            yield from self.other_biases(base, targets)


class VeraProjection(Shared):
    """A and B of all modules.

    Keys: `vera_A` `[r, in]`, `vera_B` `[out, r]` with the largest sizes of all modules; with
    `save_projection=False` none: they are drawn again, from the config's key.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, n_in: int, n_out: int, config: VeraConfig) -> None:
        super().__init__()
        self.key = config.projection_prng_key
        self.is_saved = config.save_projection
        self.register_buffer("vera_A", torch.empty(config.r, n_in))
        self.register_buffer("vera_B", torch.empty(n_out, config.r))

    def reset_parameters(self) -> None:
        """Kaiming's uniform, as PEFT draws it: on the CPU, from a generator of its own."""
        generator = torch.Generator("cpu").manual_seed(self.key)
        for name in ("vera_A", "vera_B"):
            values = torch.empty(getattr(self, name).shape, device="cpu")
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(values.shape[1]))
            setattr(self, name, values.uniform_(-bound, bound, generator=generator))

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        return super().saved() if self.is_saved else iter(())

    def load(self, tensors: TensorReader) -> None:
        super().load(tensors)
        if not self.is_saved and self.vera_A.is_meta:
            self.reset_parameters()


class VeraPart(LowRankPart):
    """The vectors of a linear module.

    Keys: `vera_lambda_d` `[r]`, `vera_lambda_b` `[out]`.
    """

    def __init__(self, module: BaseModule, projection: VeraProjection, config: VeraConfig) -> None:
        super().__init__(module, config.vera_dropout, config.bias)
        self.first = config.d_initial if config.init_weights else None
        self._projection = (projection,)  # in a tuple: it is no child of this module
        self.vera_lambda_b = nn.Parameter(torch.ones(module.out_features))
        self.vera_lambda_d = nn.Parameter(torch.randn(config.r))

    def reset_parameters(self) -> None:
        if self.first is not None:
            nn.init.constant_(self.vera_lambda_d, self.first)
            nn.init.zeros_(self.vera_lambda_b)
        super().reset_parameters()

    def primitives(self) -> list[Primitive]:
        path, (projection,) = self.module.path, self._projection
        a = self.vera_lambda_d[:, None] * projection.vera_A[:, : self.module.in_features]
        b = self.vera_lambda_b[:, None] * projection.vera_B[: self.module.out_features]
        found: list[Primitive] = [LowRank(path, a, b, 1.0)]
        change = self.bias_change()
        if change is not None:
            found.append(BiasDelta(path, change))
        return found
