"""LoKr (Yeh et al. 2023, arXiv:2309.14859): the update is a Kronecker product.

    ΔW = (α/r) · W1 ⊗ W2,   W1 `[l, m]`, W2 `[k, n]` with l·k = out, m·n = in

each whole, or itself a product of rank r. As a low-rank update it has the product of their ranks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.config import register, strict
from peftcore.errors import ConfigError
from peftcore.methods.lycoris import LycorisConfig, LycorisPart
from peftcore.primitives import LowRank

if TYPE_CHECKING:
    from peftcore.base import BaseModule


@register
@dataclass(config=strict, kw_only=True)
class LoKrConfig(LycorisConfig):
    """Config of a LoKr adapter; fields and defaults as PEFT's `LoKrConfig`."""

    peft_type: ClassVar[str] = "LOKR"
    training_only: ClassVar[frozenset[str]] = LycorisConfig.training_only | {"rank_dropout_scale"}

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    @field_validator("decompose_factor")
    @classmethod
    def _is_a_factor(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ConfigError("decompose_factor", f"{value} is neither positive nor -1")
        return value

    def part(self, module: BaseModule, rank: int, scale: float) -> LoKrPart:
        return LoKrPart(module, rank, scale, self)


class LoKrPart(LycorisPart):
    """The update of a linear module.

    Keys: `lokr_w1` `[l, m]`, or where it is a product `lokr_w1_a` `[l, r]` and `lokr_w1_b`
    `[r, m]`; `lokr_w2` `[k, n]`, or `lokr_w2_a` `[k, r]` and `lokr_w2_b` `[r, n]`.
    """

    def __init__(self, module: BaseModule, rank: int, scale: float, config: LoKrConfig) -> None:
        super().__init__(module, scale, config)
        self.init = config.init_weights
        self.rescales_rows = config.rank_dropout_scale
        l, k = factors(module.out_features, config.decompose_factor)  # noqa: E741
        m, n = factors(module.in_features, config.decompose_factor)
        self._add("lokr_w1", l, m, rank, config.decompose_both)
        self._add("lokr_w2", k, n, rank, True)

    def _add(self, name: str, rows: int, columns: int, rank: int, may_split: bool) -> None:
        """One of the two factors: a product where it may be one and that is the smaller."""
        if may_split and 2 * rank < max(rows, columns):
            setattr(self, f"{name}_a", nn.Parameter(torch.empty(rows, rank)))
            setattr(self, f"{name}_b", nn.Parameter(torch.empty(rank, columns)))
        else:
            setattr(self, name, nn.Parameter(torch.empty(rows, columns)))

    def reset_parameters(self) -> None:
        """One matrix of all is zero: of W1 by PEFT's default, of W2 as in LyCORIS, or none."""
        names = [name for name, _ in self.named_parameters()]
        zero = None
        if self.init == "lycoris":
            zero = names[-1]
        elif self.init:
            zero = names[0]
        for name, parameter in self.named_parameters():
            if name == zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def primitives(self) -> list[LowRank]:
        w1_a, w1_b = self._factored("lokr_w1")
        w2_a, w2_b = self._factored("lokr_w2")
        a, b = torch.kron(w1_b, w2_b), torch.kron(w1_a, w2_a)
        return [LowRank(self.module.path, a, b, self.scale)]

    def _factored(self, name: str) -> tuple[Tensor, Tensor]:
        """One of the two factors as a product, of the smallest rank that it is known to have."""
        if hasattr(self, name):
            whole = getattr(self, name)
        else:
            left, right = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
            if left.shape[1] <= min(left.shape[0], right.shape[1]):
                return left, right
            whole = left @ right
        rows, columns = whole.shape
        if rows < columns:
            return torch.eye(rows, dtype=whole.dtype, device=whole.device), whole
        return whole, torch.eye(columns, dtype=whole.dtype, device=whole.device)


def factors(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product: of `factor` where that divides it; else the smaller factor is first,
    the largest that is not above `factor`. -1: as square as can be."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(d for d in range(most, 0, -1) if size % d == 0)
    return first, size // first
