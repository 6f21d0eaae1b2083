"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): low-rank updates that share a budget of ranks.

    y = W x + b + s · B (e ⊙ (A x)),   s = α/(r₀ + 1e-5)

The r₀ triplets (a row of A, a value of e, a column of B) of every module are scored in training by
how much the loss feels them; those of the lowest score have their e set to zero, fewer and fewer
are spared as the budget falls. A file holds the triplets that were spared at last; s does not
change. A and B are drawn towards orthogonal rows and columns by a term of the loss.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.errors import ConfigError
from peftcore.methods.low_rank import LowRankPart, Probability, Rank, TargetedConfig
from peftcore.methods.targets import ADALORA_TARGETS
from peftcore.parts import ModulePart, Parts, Shared
from peftcore.primitives import BiasDelta, LowRank, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

Steps = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(gt=0, lt=1)]

_TRIPLETS = ("lora_A", "lora_E", "lora_B")
_IGNORED = "PEFT ignores it under AdaLoRA: remove it"


@register
@dataclass(config=strict, kw_only=True)
class AdaLoraConfig(TargetedConfig):
    """Config of an AdaLoRA adapter; fields and defaults as PEFT's `AdaLoraConfig`.

    `rank_pattern` is not for a user to set: a saved adapter's names the triplets that it kept, by
    `<module path>.lora_E`.
    """

    peft_type: ClassVar[str] = "ADALORA"
    default_targets = ADALORA_TARGETS
    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "lora_dropout",
            "init_lora_weights",
            "fan_in_fan_out",
            "megatron_core",
            "qalora_group_size",
            "eva_config",
            "runtime_config",
        }
    )
    refused: ClassVar[dict[str, str]] = {
        "alpha_pattern": _IGNORED,
        "use_rslora": _IGNORED,
        "lora_bias": _IGNORED,
        "use_qalora": _IGNORED,
        "use_bdlora": _IGNORED,
        "corda_config": _IGNORED,
        "lora_ga_config": _IGNORED,
        "kasa_config": _IGNORED,
        "velora_config": _IGNORED,
        "monteclora_config": _IGNORED,
        "arrow_config": _IGNORED,
        "alora_invocation_tokens": _IGNORED,
        "use_dora": "AdaLoRA has no magnitudes: train LORA with use_dora",
        "loftq_config": "LoftQ changes the base weights: train LORA",
        "target_parameters": "parameters of expert blocks are not served yet: target modules",
        "layer_replication": "it changes the base model's depth: serve that model as a base",
        "megatron_config": "tensor-parallel checkpoints are not served: merge the shards",
        "ensure_weight_tying": "tied adapters on embeddings are not served yet: train without",
        "trainable_token_indices": "not served beside AdaLoRA: train TRAINABLE_TOKENS apart",
    }

    r: int = 8
    init_r: Rank = 12
    target_r: Annotated[int, Field(ge=0)] = 8
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Annotated[int, Field(gt=0)] = 1
    beta1: Beta = 0.85
    beta2: Beta = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    total_step: Annotated[int, Field(gt=0)] | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 8
    lora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8 and not self.inference_mode:
            warnings.warn("r: AdaLoRA does not use it; set init_r and target_r", stacklevel=3)
        for key, kept in (self.rank_pattern or {}).items():
            if len(kept) != self.init_r:
                raise ConfigError(
                    "rank_pattern", f"{key} has {len(kept)} entries, and init_r is {self.init_r}"
                )

    def check_schedule(self) -> None:
        """Raises ConfigError where the schedule has no steps in which ranks are taken away."""
        if self.total_step is None:
            raise ConfigError("total_step", "required for training: the number of its steps")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "tinit",
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of the total_step "
                f"{self.total_step} to allocate ranks in",
            )

    def parts(self, base: BaseModel) -> Iterator[ModulePart | Shared]:
        kept = {
            key.rpartition(".lora_E")[0]: rows for key, rows in (self.rank_pattern or {}).items()
        }
        targets = self.named_modules(base, PatternMatcher())
        for path in kept.keys() - {module.path for module in targets}:
            raise ConfigError("rank_pattern", f"{path!r} is not a module that the config targets")
        allocator = RankAllocator(self)
        yield allocator
        for module in targets:
            part = AdaLoraPart(module, self, kept.get(module.path, [True] * self.init_r))
            allocator.targets.append(part)
            yield part
        if self.bias == "all":
            yield from self.other_biases(base, targets)

    def trained(self, parts: Parts) -> AdaLoraConfig:
        pattern = {
            f"{part.module.path}.lora_E": part.kept
            for part in parts.modules
            if isinstance(part, AdaLoraPart)
        }
        pruned = any(not all(kept) for kept in pattern.values())
        return dataclasses.replace(self, rank_pattern=pattern) if pruned else self

    def as_saved(self, saved: AdapterConfig) -> AdaLoraConfig:
        if not isinstance(saved, AdaLoraConfig):
            return self  # its tensors do not fit, by name
        return dataclasses.replace(self, rank_pattern=saved.rank_pattern)

    def regularization(self, parts: Parts) -> Tensor | None:
        """orth_reg_weight · the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all modules, in training."""
        norms = []
        for part in parts.modules:
            if isinstance(part, AdaLoraPart) and part.lora_A.requires_grad:
                a, b = part.lora_A, part.lora_B
                eye = torch.eye(len(a), device=a.device)
                norms += [torch.linalg.norm(a @ a.t() - eye), torch.linalg.norm(b.t() @ b - eye)]
        return self.orth_reg_weight * torch.stack(norms).mean() if norms else None


class AdaLoraPart(LowRankPart):
    """The triplets of a linear module.

    Keys: `lora_A` `[r, in]`, `lora_E` `[r, 1]`, `lora_B` `[out, r]`.

    Attributes:
        held: which of the r₀ triplets the tensors hold; only a file that is read holds fewer.
        kept: which of the r₀ are not masked; what is saved. No triplet is kept and not held.
    """

    def __init__(self, module: BaseModule, config: AdaLoraConfig, held: Sequence[bool]) -> None:
        super().__init__(module, config.lora_dropout, config.bias)
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.is_drawn_small = bool(config.init_lora_weights)
        self.held, self.kept = list(held), list(held)
        rank = sum(held)
        self.lora_A = nn.Parameter(torch.randn(rank, module.in_features))
        self.lora_E = nn.Parameter(torch.randn(rank, 1))
        self.lora_B = nn.Parameter(torch.randn(module.out_features, rank))
        torch.randn(1)  # PEFT draws one before it writes the rank there

    def reset_parameters(self) -> None:
        if self.is_drawn_small:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        super().reset_parameters()

    def num_replaced(self) -> int:
        return super().num_replaced() - 1  # PEFT has the rank as one more parameter, frozen

    @property
    def mask(self) -> list[bool]:
        """Which of the triplets in the tensors are kept."""
        return [kept for held, kept in zip(self.held, self.kept, strict=True) if held]

    @torch.no_grad()
    def keep(self, mask: Sequence[bool]) -> None:
        """Mask all but these of the triplets in the tensors."""
        rows = iter(mask)
        self.kept = [held and next(rows) for held in self.held]
        dropped = ~torch.tensor(mask, dtype=torch.bool, device=self.lora_E.device)
        self.lora_E.masked_fill_(dropped[:, None], 0.0)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        mask = self.mask
        for name, tensor in self.named_parameters():
            if name not in _TRIPLETS or all(mask):
                yield name, tensor
            else:
                yield name, tensor[:, mask] if name == "lora_B" else tensor[mask]

    def load(self, tensors: TensorReader) -> None:
        key = self.file_key("lora_E")
        if not self.lora_E.is_meta and tensors.has(key):
            # A checkpoint from before or after ranks were taken away. Which triplets it holds
            # does not matter: they are added up.
            num, room = len(tensors.peek(key)), len(self.lora_E)
            if num <= room and num != sum(self.mask):
                self.keep([i < num for i in range(room)])
        super().load(tensors)

    def assign(self, name: str, value: Tensor) -> None:
        mask = self.mask
        if name not in _TRIPLETS or all(mask):
            super().assign(name, value)
            return
        with torch.no_grad():
            rows = getattr(self, name).t() if name == "lora_B" else getattr(self, name)
            rows[mask] = (value.t() if name == "lora_B" else value).to(rows)
        if name == "lora_E":
            self.keep(mask)

    def primitives(self) -> list[Primitive]:
        path = self.module.path
        found: list[Primitive] = []
        if len(self.lora_A) > 0:
            found.append(LowRank(path, self.lora_A * self.lora_E, self.lora_B, self.scale))
        change = self.bias_change()
        if change is not None:
            found.append(BiasDelta(path, change))
        return found


class RankAllocator(Shared):
    """Takes ranks away from modules, by the importance of their triplets (section 3 of the paper).

    The importance of a number is its sensitivity |p · ∂loss/∂p|, smoothed, times how much that
    varies, smoothed; a triplet's is that of its e plus the means over its row of A and column of B.
    """

    def __init__(self, config: AdaLoraConfig) -> None:
        super().__init__()
        self.config = config
        self.targets: list[AdaLoraPart] = []
        self.reset_ipt()

    def reset_parameters(self) -> None:
        self.config.check_schedule()

    def reset_ipt(self) -> None:
        """Forget the importance that was gathered."""
        self._sensitivity: dict[tuple[int, str], Tensor] = {}
        self._variation: dict[tuple[int, str], Tensor] = {}

    def budget(self, step: int) -> int:
        """How many triplets may be left after `step`: falls with the cube of the time left."""
        config = self.config
        assert config.total_step is not None
        first = sum(len(part.lora_A) for part in self.targets)
        if step <= config.tinit:
            return first
        last = config.target_r * len(self.targets)
        end = config.total_step - config.tfinal
        left = max(0.0, 1 - (step - config.tinit) / (end - config.tinit))
        return int((first - last) * left**3 + last)

    def update_and_allocate(self, global_step: int) -> None:
        """Between `backward()` and `zero_grad()` of each step: score the triplets and mask.

        Raises:
            ConfigError: the config has no schedule.
            ValueError: there are no gradients.
        """
        self.config.check_schedule()
        assert self.config.total_step is not None
        end = self.config.total_step - self.config.tfinal
        if global_step < end:
            self._score()
            if global_step > self.config.tinit and global_step % self.config.deltaT == 0:
                self._mask(self.budget(global_step))
        elif global_step == end:
            self._mask(self.budget(global_step))
            self.reset_ipt()
        else:  # what is masked stays so, whatever the optimizer did to it
            for part in self.targets:
                part.keep(part.mask)

    @torch.no_grad()
    def _score(self) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for i, part in enumerate(self.targets):
            for name in _TRIPLETS:
                p = getattr(part, name)
                grad = p.grad if p.numel() > 0 else torch.zeros_like(p)
                if grad is None:
                    raise ValueError(
                        f"update_and_allocate: {part.module.path}.{name} has no gradient: call it "
                        "between backward() and zero_grad()"
                    )
                now = (p * grad).abs()
                zero = torch.zeros_like(now)
                smooth = beta1 * self._sensitivity.get((i, name), zero) + (1 - beta1) * now
                change = (now - smooth).abs()
                self._sensitivity[i, name] = smooth
                self._variation[i, name] = (
                    beta2 * self._variation.get((i, name), zero) + (1 - beta2) * change
                )

    def _mask(self, budget: int) -> None:
        """Keep the `budget` best triplets of all; fewer where several are the last."""
        if not self._sensitivity:
            return

        def importance(i: int, name: str) -> Tensor:
            return self._sensitivity[i, name] * self._variation[i, name]

        scores = [
            importance(i, "lora_E").flatten()
            + (importance(i, "lora_A").mean(dim=1) + importance(i, "lora_B").mean(dim=0))
            for i in range(len(self.targets))
        ]
        every = torch.cat(scores)
        num_masked = len(every) - budget
        if num_masked <= 0:
            return
        threshold = torch.kthvalue(every, num_masked).values
        for part, score in zip(self.targets, scores, strict=True):
            part.keep((score > threshold).tolist())
