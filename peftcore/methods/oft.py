"""OFT (Qiu et al. 2023, arXiv:2306.07280) and COFT, with the Cayley–Neumann series of OFTv2
(Qiu et al. 2025, 2506.19847).

    y = W (R x) + b,   R block-diagonal and orthogonal, each block made of a skew-symmetric Q:

    Cayley            R = (I − Q)(I + Q)⁻¹
    Cayley–Neumann    R = I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹  ≈  (I + Q)(I − Q)⁻¹

A row x is multiplied by R from the right. COFT keeps every Q within a small ball around zero.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import PatternMatcher, register, strict
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods.low_rank import LowRankPart, TargetedConfig
from peftcore.parts import ModulePart, Parts
from peftcore.primitives import BiasDelta, InputRotation, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

#: The release of PEFT whose series this is; earlier ones wrote no version and summed another one.
_SERIES_SINCE = "0.18.0"

Count = Annotated[int, Field(ge=0, le=1 << 20)]


@register
@dataclass(config=strict, kw_only=True)
class OFTConfig(TargetedConfig):
    """Config of an OFT adapter; fields and defaults as PEFT's `OFTConfig`."""

    peft_type: ClassVar[str] = "OFT"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"module_dropout", "init_weights", "fan_in_fan_out"}
    )

    r: Count = 0
    oft_block_size: Count = 32
    module_dropout: float = Field(0.0, ge=0, le=1)
    exclude_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = Field(6e-5, ge=0)
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = Field(5, ge=1, le=64)

    def __post_init__(self) -> None:
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                "oft_block_size",
                f"{self.oft_block_size} beside r={self.r}: their product is the layer's width, "
                "so one of them is given and the other is 0",
            )
        super().__post_init__()

    def block_size(self, in_features: int) -> int:
        """The width of the blocks on a module: what is asked for, or the nearest that divides."""
        if self.r:
            return in_features // _nearest_divisor(in_features, self.r)
        return _nearest_divisor(in_features, self.oft_block_size)

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        targets = self.named_modules(base, PatternMatcher())
        for module in targets:
            yield OFTPart(module, self)
        if self.bias == "all":
            yield from self.other_biases(base, targets)

    def build(self, base: BaseModel) -> Parts:
        if self.module_dropout and not self.inference_mode:
            warnings.warn(
                "module_dropout: has no effect on linear layers (nor has it in PEFT)", stacklevel=2
            )
        return super().build(base)

    def completed(self, base: BaseModel) -> Self:
        if self.inference_mode:
            self._check_series()
        config = super().completed(base)
        return dataclasses.replace(config, peft_version=self.peft_version or _SERIES_SINCE)

    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        self._check_series()
        return super().compile(base, tensors)

    def _check_series(self) -> None:
        if self.use_cayley_neumann and self.peft_version is None:
            raise UnsupportedError(
                "peft_version",
                f"not set: PEFT before {_SERIES_SINCE} rotated by another series under "
                "use_cayley_neumann. Train the adapter again, or, where its results in a newer "
                "PEFT are good, save it there",
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; of two as near, the smaller."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


class OFTPart(LowRankPart):
    """The rotation of a linear module's input.

    Keys: `oft_R.weight` `[num_blocks, b(b−1)/2]`, each row the upper triangle of a block's Q, row
    after row; one row under `block_share`. With a trained bias `base_layer.bias` `[out]`.
    """

    def __init__(self, module: BaseModule, config: OFTConfig) -> None:
        super().__init__(module, bias=config.bias)
        self.config = config
        self.block_size = config.block_size(module.in_features)
        self.num_blocks = module.in_features // self.block_size
        num_rows = 1 if config.block_share else self.num_blocks
        num_angles = self.block_size * (self.block_size - 1) // 2
        if num_angles == 0:
            raise ConfigError("oft_block_size", f"blocks of width 1 on {module.path} turn nothing")
        self.oft_R = nn.Module()
        self.oft_R.weight = nn.Parameter(torch.empty(num_rows, num_angles))

    @property
    def weight(self) -> Tensor:
        weight = self.oft_R.weight
        assert isinstance(weight, Tensor)
        return weight

    def reset_parameters(self) -> None:
        if self.config.init_weights:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.1)
        super().reset_parameters()

    def applied(self) -> list[Primitive]:
        if self.config.coft and self.training:
            with torch.no_grad():  # a step that left the ball is undone, as in PEFT
                self.weight.copy_(self._within_ball(self.weight))
        return self.primitives()

    def primitives(self) -> list[Primitive]:
        angles = self.weight
        if self.config.coft:
            angles = angles + (self._within_ball(angles) - angles).detach()
        blocks = rotations(self._skew(angles), self.config)
        blocks = blocks.expand(self.num_blocks, -1, -1)
        found: list[Primitive] = [InputRotation(self.module.path, blocks)]
        change = self.bias_change()
        if change is not None:
            found.append(BiasDelta(self.module.path, change))
        return found

    def _skew(self, angles: Tensor) -> Tensor:
        """`[rows, b, b]`, the Q of each row of `angles`."""
        b = self.block_size
        upper = torch.triu_indices(b, b, 1, device=angles.device)
        q = angles.new_zeros(len(angles), b, b).index_put(
            (torch.arange(len(angles), device=angles.device)[:, None], upper[0], upper[1]), angles
        )
        return q - q.mT

    def _within_ball(self, angles: Tensor) -> Tensor:
        """Each row shortened where ‖Q‖ is over eps/√rows."""
        radius = self.config.eps / math.sqrt(len(angles))
        norms = self._skew(angles.detach()).norm(dim=(1, 2))[:, None]
        return torch.where(norms <= radius, angles, angles * (radius / norms))


def rotations(q: Tensor, config: OFTConfig) -> Tensor:
    """R of each skew-symmetric Q.

    Args:
        q: `[n, b, b]`.
        config: chooses the formula. PEFT's sum of 4 terms is that of 3.
    """
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if not config.use_cayley_neumann:
        return torch.linalg.solve(identity + q, identity - q, left=False)
    num_terms = config.num_cayley_neumann_terms
    r = identity.expand_as(q)
    if num_terms == 1:
        return r
    r = r + 2 * q
    if num_terms == 2:
        return r
    power = q @ q
    r = r + 2 * power
    for _ in range(3, num_terms - 1):
        power = power @ q
        r = r + 2 * power
    return r + power @ q
