"""LoRA (Hu et al. 2021, arXiv:2106.09685) with rsLoRA (2312.03732) and DoRA (2402.09353).

    y = W x + b + s · B (A x),   s = α/r, or α/√r under rslora

DoRA rescales each output row by m/‖W + sBA‖ and leaves the bias alone:

    y = (m/‖W + sBA‖) ⊙ (W x + s · B (A x)) + b
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.config import PatternMatcher, register, strict
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods.low_rank import (
    Alpha,
    LowRankPart,
    Rank,
    TargetedConfig,
)
from peftcore.methods.targets import lookup_pattern
from peftcore.methods.trainable_tokens import named_tokens, token_parts
from peftcore.ops.trained import row_norms
from peftcore.parts import Linear, ModulePart
from peftcore.primitives import BiasDelta, LowRank, OutputScale, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

#: Initializations that leave the base model's weights as they are.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class LoraTarget(NamedTuple):
    """A module that gets an update, of rank `rank` and with the factor `scale`."""

    module: BaseModule
    rank: int
    scale: float


@register
@dataclass(config=strict, kw_only=True)
class LoraConfig(TargetedConfig):
    """Config of a LoRA adapter; fields and defaults as PEFT's `LoraConfig`."""

    peft_type: ClassVar[str] = "LORA"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {
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
        "target_parameters": "parameters of expert blocks are not served yet: target modules",
        "layer_replication": "it changes the base model's depth: serve that model as a base",
        "loftq_config": "LoftQ changes the base weights: convert the adapter to plain LoRA",
        "corda_config": "CorDA changes the base weights: convert the adapter to plain LoRA",
        "lora_ga_config": "LoRA-GA changes the base weights: convert the adapter to plain LoRA",
        "kasa_config": "KaSA changes the base weights: convert the adapter to plain LoRA",
        "alora_invocation_tokens": "activated LoRA is not served yet: train plain LoRA",
        "arrow_config": "Arrow routes at run time: name a mixture in the request instead",
        "use_qalora": "QA-LoRA pools the inputs: train plain LoRA",
        "use_bdlora": "block-diagonal LoRA is not served yet: expand its blocks to plain LoRA",
        "velora_config": "VeLoRA is not known to serve as plain LoRA: train plain LoRA",
        "monteclora_config": "MonteCLoRA samples its weights: export its mean as plain LoRA",
        "megatron_config": "tensor-parallel checkpoints are not served: merge the shards",
        "ensure_weight_tying": "tied adapters on embeddings are not served yet: train without",
    }

    r: Rank = 8
    exclude_modules: list[str] | str | None = None
    lora_alpha: Alpha = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, Rank] | None = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] | None = Field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        if self.init_lora_weights not in _PLAIN_INITS:
            raise UnsupportedError(
                "init_lora_weights",
                f"{self.init_lora_weights!r} changes the base weights: convert the adapter to "
                "plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias", "cannot be combined with use_dora")
        super().__post_init__()

    def targets(self, base: BaseModel) -> list[LoraTarget]:
        """The modules of `base` that get an update."""
        matcher = PatternMatcher()
        modules = self.named_modules(base, matcher, embeddings=True)

        def value(path: str, field: str, default: float) -> float:
            return lookup_pattern(path, getattr(self, field), default, field, matcher)

        found = []
        for module in modules:
            rank = int(value(module.path, "rank_pattern", self.r))
            alpha = value(module.path, "alpha_pattern", self.lora_alpha)
            scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
            found.append(LoraTarget(module, rank, scale))
        return found

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        targets = self.targets(base)
        for target in targets:
            if target.module.kind == "embedding":
                yield LoraEmbeddingPart(target, self)
            else:
                yield LoraPart(target, self)
        if self.bias == "all":
            yield from self.other_biases(base, [target.module for target in targets])
        if self.trainable_token_indices is not None:
            wanted = named_tokens(base, self.trainable_token_indices)
            yield from token_parts(base, wanted, "trainable_token_indices", "token_adapter.")

    def canonical(self) -> dict[str, Any]:
        values = super().canonical()
        del values["trainable_token_indices"]
        if self.trainable_token_indices is not None:  # the order of ids is that of rows: it counts
            values["trainable_token_indices"] = self.trainable_token_indices
        return values


class LoraPart(LowRankPart):
    """A low-rank update of a linear module; under DoRA with its row magnitudes.

    Keys: `lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`; by option `lora_B.bias` `[out]`,
    `lora_magnitude_vector` `[out]`, `base_layer.bias` `[out]`.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, target: LoraTarget, config: LoraConfig) -> None:
        module, rank, self.scale = target
        super().__init__(module, config.lora_dropout, config.bias)
        self.init = config.init_lora_weights
        self.own_forward = config.use_dora and self.dropout is not None
        self.exclusive = config.use_dora
        self.lora_A = Linear(module.in_features, rank, bias=False)
        self.lora_B = Linear(rank, module.out_features, bias=config.lora_bias)
        #: ‖W‖² of each row, made when first needed: the base does not change.
        self._base_norms: Tensor | None = None
        magnitude = nn.Parameter(torch.empty(module.out_features)) if config.use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)

    def reset_parameters(self) -> None:
        rank = len(self.lora_A.weight)
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank)
        elif self.init is True:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        elif self.init is not False:
            raise UnsupportedError(
                "init_lora_weights",
                f"{self.init!r} is not trainable here: use True, False or 'gaussian'",
            )
        if self.init is not False:
            nn.init.zeros_(self.lora_B.weight)
            if self.lora_B.bias is not None:
                nn.init.zeros_(self.lora_B.bias)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.data = self._row_norms()
        super().reset_parameters()

    def primitives(self) -> list[Primitive]:
        path, up = self.module.path, self.lora_B
        found: list[Primitive] = [LowRank(path, self.lora_A.weight, up.weight, self.scale)]
        delta: Tensor | None = None
        if up.bias is not None:
            delta = self.scale * up.bias
        magnitude = self.lora_magnitude_vector
        if magnitude is not None:
            v = magnitude / self._row_norms()
            found.append(OutputScale(path, v))
            bias = self.module.bias()
            if bias is not None:
                delta = bias * (1 - v)
        change = self.bias_change()
        if change is not None:
            delta = change if delta is None else delta + change
        if delta is not None:
            found.append(BiasDelta(path, delta))
        return found

    def forward(self, base: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """DoRA with dropout: the rows' own product is not dropped, what is added to it is."""
        assert self.dropout is not None
        assert self.lora_magnitude_vector is not None
        y = base(x)
        dropped = self.dropout(x.to(self.lora_A.weight.dtype))
        v = self.lora_magnitude_vector / self._row_norms()
        own = F.linear(dropped, self.module.weight())
        update = self.lora_B(self.lora_A(dropped)) * self.scale
        return y + ((v - 1) * own + v * update).to(y.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + sBA‖ of each row, `[out]`, no gradient.

        W is only multiplied with, which a quantized base does in tiles.
        """
        b, a = self.lora_B.weight, self.lora_A.weight
        if self._base_norms is None or self._base_norms.device != a.device:
            self._base_norms = self.module.weight().square().sum(dim=1)
        across = self.module.multiply(a)
        return row_norms(a, b, across, self._base_norms, self.scale)


class LoraEmbeddingPart(ModulePart):
    """A low-rank update of an embedding.

    Keys: `lora_embedding_A` `[r, num_embeddings]`, `lora_embedding_B` `[dim, r]`.
    """

    def __init__(self, target: LoraTarget, config: LoraConfig) -> None:
        module, rank, self.scale = target
        super().__init__(module)
        if config.use_dora or config.lora_bias:
            field = "use_dora" if config.use_dora else "lora_bias"
            raise UnsupportedError(
                field, f"is not supported for {module.path}, an embedding: target linear modules"
            )
        num_embeddings, dim = module.module.weight.shape  # type: ignore[misc]
        self.from_zero = config.init_lora_weights is not False
        self.lora_embedding_A = nn.Parameter(torch.randn(rank, num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(dim, rank))

    def reset_parameters(self) -> None:
        if self.from_zero:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)

    def primitives(self) -> list[Primitive]:
        return [LowRank(self.module.path, self.lora_embedding_A, self.lora_embedding_B, self.scale)]
