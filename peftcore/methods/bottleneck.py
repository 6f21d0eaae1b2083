"""Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020 (2005.00247),
parallel ones of He et al. 2021 (2110.04366).

    f(x) = s · (U act(D x + b) + c)

is added to a branch of a layer, attention's or the feed-forward block's. What x is, what else is
added and which norms come between are options; `program.Bottleneck` has what they amount to. PEFT
has no such method: names, defaults and files are those of AdapterHub's `adapters`, whose files this
package reads and writes (`checkpoint.adapterhub_format`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.branches import Branch, branches_of
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig, register, strict
from peftcore.errors import CheckpointError, ConfigError, UnsupportedError
from peftcore.ops.bottleneck import EPSILON, activation
from peftcore.parts import Linear, ModulePart, StreamTap, assign
from peftcore.primitives import Bottleneck, BranchValue, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

# Within these no width that is made of one overflows.
Factor = Annotated[int | float, Field(ge=1e-3, le=1e6)]
Probability = Annotated[float, Field(ge=0, lt=1)]

#: AdapterHub's named configs: what differs from the defaults, which are those of `seq_bn`.
PRESETS: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": {
        "mh_adapter": True,
        "original_ln_before": False,
        "non_linearity": "swish",
    },
    "par_bn": {
        "original_ln_before": False,
        "is_parallel": True,
        "reduction_factor": 2,
        "scaling": 4.0,
        "init_weights": "mam_adapter",
    },
}
PRESETS["scaled_par_bn"] = PRESETS["par_bn"] | {"scaling": "learned"}

#: What they were called before.
_OLD_PRESETS = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
}


@register
@dataclass(config=strict, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Config of a bottleneck adapter: AdapterHub's `BnConfig`, by default its `SeqBnConfig`.

    Attributes:
        mh_adapter: one on each layer's attention.
        output_adapter: one on each layer's feed-forward block.
        reduction_factor: hidden size over the bottleneck's; or by layer, `{"1": 8, "default": 16}`.
        scaling: s; or "learned": one number a layer; or "channel": one for each feature.
        leave_out: layers that have none.
        name: what AdapterHub calls the adapter, in the keys of its file too.
        model_type, model_class, hidden_size: of the base, filled in.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "dropout",
            "init_weights",
            "init_weights_seed",
            "stochastic_depth",
            "name",
            "model_type",
            "model_class",
            "hidden_size",
        }
    )
    refused: ClassVar[dict[str, str]] = {
        "phm_layer": "Compacter's hypercomplex layers are not supported: train seq_bn",
        "inv_adapter": "invertible adapters at the embedding are not supported: train without",
        "use_gating": "a gate averages over the whole sequence: train without",
        "cross_adapter": "there is no cross attention in the models that are supported",
    }

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: Factor | dict[str, Factor] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: Annotated[float, Field(ge=-1e6, le=1e6)] | Literal["learned", "channel"] = 1.0
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    leave_out: list[int] = dataclasses.field(default_factory=list)
    dropout: Probability = 0.0
    stochastic_depth: Probability = 0.0
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "bert"
    init_weights_seed: int | None = None
    name: Annotated[str, Field(pattern=r"^[^.\s]+$")] = "default"
    model_type: str | None = None
    model_class: str | None = None
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        try:
            activation(self.non_linearity.lower())
        except KeyError:
            raise UnsupportedError(
                "non_linearity", f"{self.non_linearity!r} is not a known function without weights"
            ) from None
        if not (self.mh_adapter or self.output_adapter):
            raise ConfigError("output_adapter", "neither this nor mh_adapter is set")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ConfigError("residual_before_ln", "post_add needs original_ln_before")

    @classmethod
    def preset(cls, name: str, /, **changes: Any) -> Self:
        """AdapterHub's config of that name, with changes: `seq_bn` (`pfeiffer`), `double_seq_bn`
        (`houlsby`), `par_bn` (`parallel`), `scaled_par_bn` (`scaled_parallel`).

        Raises:
            UnsupportedError: not the name of a bottleneck.
        """
        found = PRESETS.get(_OLD_PRESETS.get(name, name))
        if found is None:
            names = ", ".join(sorted([*PRESETS, *_OLD_PRESETS]))
            raise UnsupportedError("config", f"{name!r} is not one of {names}")
        return cls(**(found | changes))

    def completed(self, base: BaseModel) -> Self:
        self._check_base(base)
        return dataclasses.replace(
            self,
            model_type=base.model_type,
            model_class=base.model_class,
            hidden_size=base.hidden_size,
        )

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        self._check_base(base)
        found = False
        for branch in branches_of(base):
            wanted = self.mh_adapter if branch.kind == "attention" else self.output_adapter
            if not wanted or branch.layer in self.leave_out:
                continue
            found = True
            block = BottleneckBlock(branch, base.modules[branch.path], base.hidden_size, self)
            if block.stream is not None:
                yield StreamTap(base.modules[block.stream])
            yield block
        if not found:
            raise ConfigError("leave_out", "no layer is left")

    def _check_base(self, base: BaseModel) -> None:
        for field in ("model_type", "hidden_size"):
            mine, its = getattr(self, field), getattr(base, field)
            if mine is not None and mine != its:
                raise ConfigError(field, f"the adapter is for {mine!r}, the base model has {its!r}")

    def width(self, layer: int, hidden_size: int) -> int:
        """The bottleneck's size in a layer."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            found = factor.get(str(layer), factor.get("default"))
            if found is None:
                raise ConfigError("reduction_factor", f"neither layer {layer} nor a default")
            factor = found
        return max(1, int(hidden_size // factor))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write AdapterHub's `adapter_config.json` into `folder`."""
        from peftcore.checkpoint import adapterhub_format

        adapterhub_format.write_config(Path(folder), self)


class BottleneckBlock(ModulePart):
    """One bottleneck on one branch.

    Keys: `adapter_down.0` (under ln_before a norm, whose keys come twice, also as
    `adapter_norm_before`; then `adapter_down.1` is the linear map), `adapter_up`, by option
    `scaling` and `adapter_norm_after`.

    Attributes:
        stream: path of the norm whose input it reads, or None.
    """

    exclusive = True

    def __init__(
        self, branch: Branch, module: BaseModule, hidden_size: int, config: BottleneckConfig
    ) -> None:
        super().__init__(module, config.dropout)
        self.branch = branch
        self.config = config
        post_norm = branch.stream is None
        self.ends_branch = post_norm
        if config.residual_before_ln == "post_add" and not post_norm:
            raise ConfigError(
                "residual_before_ln", f"post_add needs a norm after the branch: {branch.path}"
            )
        self.reads, self.keeps = _values(config, post_norm)
        width = config.width(branch.layer, hidden_size)
        norm = [nn.LayerNorm(hidden_size, EPSILON)] if config.ln_before else []
        self.adapter_down = nn.Sequential(*norm, Linear(hidden_size, width))
        self.adapter_up = Linear(width, hidden_size)
        if isinstance(config.scaling, str):
            size = 1 if config.scaling == "learned" else hidden_size
            self.scaling = nn.Parameter(torch.ones(size))
        if config.ln_after:
            self.adapter_norm_after = nn.LayerNorm(hidden_size, EPSILON)
        needs_stream = not config.original_ln_after or {self.reads, self.keeps} != {"branch"}
        self.stream = branch.stream if needs_stream else None

    def reset_parameters(self) -> None:
        config = self.config
        if config.stochastic_depth:
            raise UnsupportedError("stochastic_depth", "is not supported in training: set 0.0")
        seed = config.init_weights_seed
        with torch.random.fork_rng(devices=[]) if seed else nullcontext():
            if seed:
                torch.manual_seed(seed)
            linear, up = self.adapter_down[-1], self.adapter_up
            assert isinstance(linear, nn.Linear)
            if config.init_weights == "bert":
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.normal_(up.weight, std=0.02)
            elif config.init_weights == "houlsby":
                for weight in (linear.weight, up.weight):
                    nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
        nn.init.zeros_(linear.bias)
        nn.init.zeros_(up.bias)

    def file_key(self, name: str) -> str:
        return f"{self.branch.hub}.adapters.{self.config.name}.{name}"

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        if self.config.ln_before:
            yield from self.adapter_down[0].named_parameters("adapter_norm_before")

    def load(self, tensors: TensorReader) -> None:
        for name, tensor in list(self.saved()):
            key = self._key_in(tensors, name)
            why = f"the config names {self.module.path}"
            if not name.startswith("adapter_norm_before."):
                assign(self, name, tensors.take(key, tuple(tensor.shape), why))
            elif tensors.has(key):
                taken = tensors.take(key, tuple(tensor.shape))
                if not torch.equal(taken, self.get_parameter(_DOUBLE[name]).cpu()):
                    raise CheckpointError(key, "is not the same as adapter_down.0, its other name")

    def _key_in(self, tensors: TensorReader, name: str) -> str:
        """The key, with the backbone's name or without: as the model had it that was saved."""
        key, backbone = self.file_key(name), self.branch.backbone
        if tensors.has(key):
            return key
        other = key.removeprefix(backbone) if key.startswith(backbone) else backbone + key
        return other if tensors.has(other) else key

    def primitives(self) -> list[Primitive]:
        config = self.config
        linear, up = self.adapter_down[-1], self.adapter_up
        assert isinstance(linear, nn.Linear)
        down: Tensor = linear.weight
        down_bias: Tensor = linear.bias
        if config.ln_before:
            norm = self.adapter_down[0]
            assert isinstance(norm, nn.LayerNorm)
            down, down_bias = down * norm.weight, down_bias + down @ norm.bias
        scale = self.scaling[:, None] if isinstance(config.scaling, str) else config.scaling
        after = self.adapter_norm_after if config.ln_after else None
        return [
            Bottleneck(
                self.module.path,
                self.stream,
                down,
                down_bias,
                up.weight * scale,
                (up.bias[:, None] * scale)[:, 0],
                config.non_linearity.lower(),
                self.reads,
                self.keeps,
                closes=config.original_ln_after,
                normalizes=config.ln_before,
                norm_weight=None if after is None else after.weight,
                norm_bias=None if after is None else after.bias,
                keeps_in_norm=config.adapter_residual_before_ln and not config.is_parallel,
            )
        ]


#: The other name of a parameter that is saved twice.
_DOUBLE = {f"adapter_norm_before.{p}": f"adapter_down.0.{p}" for p in ("weight", "bias")}


def _values(config: BottleneckConfig, post_norm: bool) -> tuple[BranchValue, BranchValue]:
    """What a bottleneck reads, and what it is added to."""
    if config.is_parallel:
        return "stream", "branch"
    reads: BranchValue = "branch"
    if config.original_ln_before:
        reads = "normed" if post_norm else "sum"
    if config.residual_before_ln == "post_add":
        return reads, "sum"
    return reads, "branch" if config.residual_before_ln else reads
