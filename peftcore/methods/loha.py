"""LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): the update is a Hadamard product of two.

    ΔW = (α/r) · (W1a W1b) ⊙ (W2a W2b)

A product of sums is the sum of all products: as a low-rank update it has rank r².
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from peftcore.config import register, strict
from peftcore.methods.lycoris import LycorisConfig, LycorisPart
from peftcore.primitives import LowRank

if TYPE_CHECKING:
    from peftcore.base import BaseModule


@register
@dataclass(config=strict, kw_only=True)
class LoHaConfig(LycorisConfig):
    """Config of a LoHa adapter; fields and defaults as PEFT's `LoHaConfig`."""

    peft_type: ClassVar[str] = "LOHA"

    init_weights: bool = True

    def part(self, module: BaseModule, rank: int, scale: float) -> LoHaPart:
        return LoHaPart(module, rank, scale, self)


class LoHaPart(LycorisPart):
    """The update of a linear module.

    Keys: `hada_w1_a`, `hada_w2_a` `[out, r]`; `hada_w1_b`, `hada_w2_b` `[r, in]`.
    """

    def __init__(self, module: BaseModule, rank: int, scale: float, config: LoHaConfig) -> None:
        super().__init__(module, scale, config)
        self.from_zero = config.init_weights
        self.rescales_rows = True
        self.hada_w1_a = nn.Parameter(torch.empty(module.out_features, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, module.in_features))
        self.hada_w2_a = nn.Parameter(torch.empty(module.out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, module.in_features))

    def reset_parameters(self) -> None:
        for parameter in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if self.from_zero:
            nn.init.zeros_(self.hada_w2_b)
        else:
            nn.init.kaiming_uniform_(self.hada_w2_b, a=math.sqrt(5))

    def primitives(self) -> list[LowRank]:
        w1_a, w1_b, w2_a, w2_b = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        n_out, rank = w1_a.shape
        n_in = w1_b.shape[1]
        if rank * rank <= min(n_out, n_in):
            a = (w1_b[:, None] * w2_b[None]).reshape(-1, n_in)
            b = (w1_a[:, :, None] * w2_a[:, None]).reshape(n_out, -1)
        else:  # no matrix of this shape has such a rank
            b = (w1_a @ w1_b) * (w2_a @ w2_b)
            a = torch.eye(n_in, dtype=b.dtype, device=b.device)
            if n_out < n_in:
                a, b = b, torch.eye(n_out, dtype=b.dtype, device=b.device)
        return [LowRank(self.module.path, a, b, self.scale)]
