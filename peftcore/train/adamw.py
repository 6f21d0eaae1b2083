"""AdamW over many small parameters: torch's fused step, without what torch does around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: torch's own defaults.
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class AdamW(Optimizer):
    """As `torch.optim.AdamW(fused=True)`, to the last bit.

    An adapter has hundreds of parameters; around each torch's step does checks and keeps a tensor
    that counts. Here parameters that have met the same steps share one count. What has no gradient
    in a step is left out of it.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_count: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_count.setdefault(self._count(p), []).append(p)
            for count, params in by_count.items():
                self._update(params, count, group["lr"], group["weight_decay"])

    def _count(self, p: Tensor) -> int:
        """How many steps p has met."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        count: int = state["step"]
        return count

    def _update(self, params: list[Tensor], count: int, lr: float, weight_decay: float) -> None:
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] = count + 1
        step = torch.tensor(float(count + 1), device=params[0].device)
        torch._fused_adamw_(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(params),
            lr=lr,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=weight_decay,
            eps=_EPSILON,
            amsgrad=False,
            maximize=False,
        )
