"""LoRA (Hu et al. 2021, arXiv:2106.09685) with rsLoRA (2312.03732) and DoRA (2402.09353).

    y = W x + b + s · B (A x),   s = α/r, or α/√r under rslora

DoRA rescales each output row by m/‖W + sBA‖ and leaves the bias alone:

    y = (m/‖W + sBA‖) ⊙ (W x + s · B (A x)) + b
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import PREFIX, TensorReader
from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.errors import CheckpointError, ConfigError, UnsupportedError
from peftcore.methods.targets import LORA_TARGETS, lookup_pattern, resolve_targets
from peftcore.methods.training import AdapterLayer, LayerAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftcore.base import BaseModel, BaseModule
    from peftcore.program import Primitive

#: Initializations that leave the base model's weights as they are.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

# Far beyond any in use, and small enough that no factor made of them overflows.
Rank = Annotated[int, Field(gt=0, le=1 << 20)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class LoraTarget(NamedTuple):
    """A module that gets an update, of rank `rank` and with the factor `scale`."""

    module: BaseModule
    rank: int
    scale: float


@register
@dataclass(config=strict, kw_only=True)
class LoraConfig(AdapterConfig):
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
        "modules_to_save": "full copies of modules are not served yet: train without it",
        "trainable_token_indices": "row overrides of embeddings are not served yet: train without",
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
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: Alpha = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] | None = Field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    def __post_init__(self) -> None:
        if self.init_lora_weights not in _PLAIN_INITS:
            raise UnsupportedError(
                "init_lora_weights",
                f"{self.init_lora_weights!r} changes the base weights: convert the adapter to "
                "plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias", "cannot be combined with use_dora")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) not in (None, []):
                raise ConfigError(name, "cannot be combined with a target_modules that is a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern", "set, though layers_to_transform is not")

    def targets(self, base: BaseModel) -> list[LoraTarget]:
        """The modules of `base` that get an update."""
        matcher = PatternMatcher()
        modules = resolve_targets(
            base,
            matcher,
            target_modules=self.target_modules or LORA_TARGETS.get(base.model_type),
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
        )

        def value(path: str, field: str, default: float) -> float:
            return lookup_pattern(path, getattr(self, field), default, field, matcher)

        found = []
        for module in modules:
            rank = int(value(module.path, "rank_pattern", self.r))
            alpha = value(module.path, "alpha_pattern", self.lora_alpha)
            scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
            found.append(LoraTarget(module, rank, scale))
        return found

    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        from peftcore.program import BiasDelta, LowRank, OutputScale

        primitives: list[Primitive] = []
        targets = self.targets(base)
        for module, rank, scale in targets:
            prefix = PREFIX + module.path
            why = f"target_modules names {module.path}"
            a = tensors.take(f"{prefix}.lora_A.weight", (rank, module.in_features), why)
            b = tensors.take(f"{prefix}.lora_B.weight", (module.out_features, rank), why)
            primitives.append(LowRank(module.path, a, b, scale))
            delta: Tensor | None = None
            if self.lora_bias:
                delta = scale * tensors.take(
                    f"{prefix}.lora_B.bias", (module.out_features,), "lora_bias is set"
                )
            if self.use_dora:
                magnitude = tensors.take(
                    f"{prefix}.lora_magnitude_vector", (module.out_features,), "use_dora is set"
                )
                norm = torch.linalg.norm(torch.addmm(module.weight(), b, a, alpha=scale), dim=1)
                v = magnitude / norm
                primitives.append(OutputScale(module.path, v))
                bias = module.bias()
                if bias is not None:
                    delta = bias * (1 - v)
            if self.bias != "none":
                delta = _add(delta, self._bias_delta(module, f"{prefix}.base_layer.bias", tensors))
            if delta is not None:
                primitives.append(BiasDelta(module.path, delta))
            if module.is_output:
                _check_saved_output(module, f"{prefix}.base_layer.weight", tensors)
        if self.bias == "all":
            primitives += self._other_biases(base, {t.module.path for t in targets}, tensors)
        return primitives

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> LayerAdapter:
        """A new adapter on `model`. See `peftcore.methods.training.Trainable`."""
        if self.bias != "none":
            raise UnsupportedError("bias", f"{self.bias!r} is not trainable here: use lora_bias")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UnsupportedError(
                "init_lora_weights",
                f"{self.init_lora_weights!r} is not trainable here: use true, false or 'gaussian'",
            )
        if self.use_dora and self.lora_dropout > 0:
            raise UnsupportedError("lora_dropout", "is not trainable together with use_dora: use 0")
        layers: dict[str, AdapterLayer] = {}
        for target in self.targets(base):
            path = target.module.path
            if target.module.is_output:
                raise UnsupportedError(
                    "target_modules", f"{path}, the output embedding, is not trainable here"
                )
            layers[path] = LoraLayer(target, self)
        targets = self.target_modules or LORA_TARGETS[base.model_type]
        return LayerAdapter(model, dataclasses.replace(self, target_modules=targets), layers)

    def _bias_delta(self, module: BaseModule, key: str, tensors: TensorReader) -> Tensor | None:
        """bias="all" and "lora_only" store absolute biases: what they add to the base's own."""
        bias = module.bias()
        if bias is None:
            return None
        return tensors.take(key, tuple(bias.shape), f"bias={self.bias!r}") - bias

    def _other_biases(
        self, base: BaseModel, targets: set[str], tensors: TensorReader
    ) -> list[Primitive]:
        """bias="all" trains the biases of modules that have no update too, norms among them."""
        from peftcore.program import BiasDelta

        found: list[Primitive] = []
        for module in base.modules.values():
            if module.path in targets:
                continue
            delta = self._bias_delta(module, f"{PREFIX}{module.path}.bias", tensors)
            if delta is not None:
                found.append(BiasDelta(module.path, delta))
        return found


class LoraLayer(AdapterLayer):
    """A linear module with a low-rank update in training; under DoRA with its row magnitudes.

    The parameters are float32 whatever the base computes in.
    """

    def __init__(self, target: LoraTarget, config: LoraConfig) -> None:
        module, rank, self.scale = target
        super().__init__(module.module)
        self._module = module
        self.dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(module.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, module.out_features, bias=config.lora_bias)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank)
        elif config.init_lora_weights is True:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if config.init_lora_weights is not False:
            nn.init.zeros_(self.lora_B.weight)
            if config.lora_bias:
                nn.init.zeros_(self.lora_B.bias)
        self.lora_magnitude_vector = nn.Parameter(self._row_norms()) if config.use_dora else None

    def _row_norms(self) -> Tensor:
        """‖W + sBA‖ of each row, `[out]`, no gradient (section 4.3 of the DoRA paper)."""
        with torch.no_grad():
            update = self.lora_B.weight @ self.lora_A.weight
            return torch.linalg.norm(self._module.weight() + self.scale * update, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        x = self.dropout(x.to(self.lora_A.weight.dtype))
        update = self.lora_B(self.lora_A(x)) * self.scale
        if self.lora_magnitude_vector is None:
            return (y + update).to(y.dtype)
        v = self.lora_magnitude_vector / self._row_norms()
        bias = self._module.bias()
        return ((y + update) * v if bias is None else (y - bias + update) * v + bias).to(y.dtype)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _check_saved_output(module: BaseModule, key: str, tensors: TensorReader) -> None:
    """PEFT saves a copy of the output embedding when it is a target; it must be the base's own."""
    if not tensors.has(key):
        return
    weight = module.weight()
    saved = tensors.take(key, tuple(weight.shape))
    if float((saved - weight).norm()) > 0.2 * float(weight.norm()):
        raise CheckpointError(
            key,
            "differs from the base model's weights: this adapter changes its base, "
            "or was trained on another one",
        )
