"""AdamW over many small parameters, without what torch's does around the arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from peftcore.ops.optimizer import adamw_

#: torch's own defaults.
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class AdamW(Optimizer):
    """As `torch.optim.AdamW(fused=True)`.

    An adapter has hundreds of parameters; around each torch's step does checks and keeps a tensor
    that counts. Here parameters that have met the same steps share one count and one call. What
    has no gradient in a step is left out of it.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_count: dict[int, _Same] = {}
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                count = state["step"]
                same = by_count.get(count) or by_count.setdefault(count, _Same([], [], [], []))
                same.values.append(p)
                same.grads.append(grad)
                same.means.append(state["exp_avg"])
                same.squares.append(state["exp_avg_sq"])
            for count, same in by_count.items():
                adamw_(
                    *same,
                    lr=group["lr"],
                    beta1=_BETAS[0],
                    beta2=_BETAS[1],
                    eps=_EPSILON,
                    weight_decay=group["weight_decay"],
                    count=count,
                )


class _Same(NamedTuple):
    """Parameters that have met the same steps, as `adamw_` takes them."""

    values: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
