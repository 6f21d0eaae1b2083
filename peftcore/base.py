"""What an adapter is compiled against: the base model's modules by path, kind, shape and weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.quant.linear import QuantLinear

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class BaseModule:
    """One module of the base.

    `in_features`, `out_features` are those of the map y = W x + b that it computes, whatever its
    storage (a Conv1D stores Wᵀ); both are 0 for a module that is not linear.
    """

    path: str
    kind: Kind
    in_features: int
    out_features: int
    module: nn.Module = field(repr=False, compare=False)
    is_output: bool = False

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    def weight(self) -> Tensor:
        """W as `[out_features, in_features]` float32; dequantized where the base is quantized.

        May share memory with the base: not to be changed.
        """
        if isinstance(self.module, QuantLinear):
            return self.module.dequantize()
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().to(torch.float32)
        return weight.t() if self.kind == "conv1d" else weight

    def bias(self) -> Tensor | None:
        """b as `[out_features]` float32, or None. A buffer of that name is a mask, not a bias."""
        if isinstance(self.module, QuantLinear):
            bias = self.module.bias
        else:
            bias = dict(self.module.named_parameters(recurse=False)).get("bias")
        return None if bias is None else bias.detach().to(torch.float32)


@dataclass(frozen=True)
class BaseModel:
    """The base as adapters see it. Made before any module is wrapped; knows no adapter."""

    model_type: str
    hidden_size: int
    #: Per attention layer: (num_kv_heads, key head_dim, value head_dim).
    kv_shapes: Sequence[tuple[int, int, int]]
    modules: Mapping[str, BaseModule]

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, kv_shapes: Sequence[tuple[int, int, int]] | None = None
    ) -> BaseModel:
        """Describe `model`. `kv_shapes` are read from its config where they are not measured."""
        config = model.config.get_text_config()
        output = model.get_output_embeddings()
        modules = {
            path: _describe(path, module, module is output)
            for path, module in model.named_modules()
            if path
        }
        if kv_shapes is None:
            heads = config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
            kv_shapes = [(num_kv_heads, head_dim, head_dim)] * config.num_hidden_layers
        return cls(config.model_type, config.hidden_size, tuple(kv_shapes), modules)

    def module_names(self) -> list[str]:
        """The distinct last path segments of the linear modules, for messages."""
        return sorted({m.path.rsplit(".", 1)[-1] for m in self.modules.values() if m.is_linear})

    def structure(self) -> str:
        """SHA-256 over the modules' paths and shapes as hex; the same however it is quantized."""
        digest = hashlib.sha256(f"{self.model_type} {self.hidden_size} {self.kv_shapes}".encode())
        for module in self.modules.values():
            digest.update(f"{module.path} {module.in_features} {module.out_features}".encode())
        return digest.hexdigest()


def _describe(path: str, module: nn.Module, is_output: bool) -> BaseModule:
    if isinstance(module, nn.Linear | QuantLinear):
        return BaseModule(
            path, "linear", module.in_features, module.out_features, module, is_output
        )
    if isinstance(module, Conv1D):
        return BaseModule(path, "conv1d", module.nx, module.nf, module, is_output)
    if isinstance(module, nn.Embedding):
        return BaseModule(path, "embedding", 0, 0, module)
    return BaseModule(path, "other", 0, 0, module)
