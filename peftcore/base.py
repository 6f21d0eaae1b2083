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

from peftcore.quant import QuantLinear, dequantize, is_quantized

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
    #: The output embedding, which makes logits over the vocabulary.
    is_output: bool = False
    #: The output embedding or a classifier: what `all-linear` leaves out.
    is_head: bool = False

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    def weight(self) -> Tensor:
        """W as `[out_features, in_features]` float32; dequantized where the base is quantized.

        May share memory with the base: not to be changed.
        """
        if is_quantized(self.module):
            return dequantize(self.module)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().to(torch.float32)
        return weight.t() if self.kind == "conv1d" else weight

    def multiply(self, x: Tensor) -> Tensor:
        """x Wᵀ, no gradient.  x: `[rows, in_features]` float32; returns `[rows, out_features]`."""
        if isinstance(self.module, QuantLinear) and not x.is_cuda:
            return self.module.multiply(x, torch.float32, bias=False)
        return x @ self.weight().t()

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
    num_attention_heads: int = 0
    #: Path of the input embedding.
    input_embedding: str = ""
    #: Path of the output embedding that the model's config says shares the input's weight.
    tied_output: str | None = None
    #: Name of the model's class.
    model_class: str = ""

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, kv_shapes: Sequence[tuple[int, int, int]] | None = None
    ) -> BaseModel:
        """Describe `model`. `kv_shapes` are read from its config where they are not measured."""
        config = model.config.get_text_config()
        output = model.get_output_embeddings()
        heads = () if output is not None else ("score", "classifier")
        modules = {
            path: _describe(path, module, module is output, module is output or path in heads)
            for path, module in model.named_modules()
            if path
        }
        if kv_shapes is None:
            heads = config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
            kv_shapes = [(num_kv_heads, head_dim, head_dim)] * config.num_hidden_layers
        embedding = model.get_input_embeddings()
        return cls(
            config.model_type,
            config.hidden_size,
            tuple(kv_shapes),
            modules,
            config.num_attention_heads,
            next((path for path, m in modules.items() if m.module is embedding), ""),
            next((path for path, m in modules.items() if m.is_output), None)
            if getattr(config, "tie_word_embeddings", False)
            else None,
            model_class=type(model).__name__,
        )

    @property
    def embeddings(self) -> list[BaseModule]:
        """The input embedding and the output embedding, where there is one."""
        return [m for m in self.modules.values() if m.is_output or m.path == self.input_embedding]

    def module_names(self) -> list[str]:
        """The distinct last path segments of the linear modules, for messages."""
        return sorted({m.path.rsplit(".", 1)[-1] for m in self.modules.values() if m.is_linear})

    def structure(self) -> str:
        """SHA-256 over the modules' paths and shapes as hex; the same however it is quantized."""
        digest = hashlib.sha256(f"{self.model_type} {self.hidden_size} {self.kv_shapes}".encode())
        for module in self.modules.values():
            digest.update(f"{module.path} {module.in_features} {module.out_features}".encode())
        return digest.hexdigest()

    def values(self) -> str:
        """SHA-256 over the beginnings of the modules' tensors as hex: another for a model that was
        trained on, or quantized in another way."""
        digest = hashlib.sha256()
        for module in self.modules.values():
            for name, tensor in module.module.state_dict().items():
                start = tensor.detach().reshape(-1)[:1024].cpu().contiguous()
                digest.update(f"{module.path} {name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(start.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _describe(path: str, module: nn.Module, is_output: bool, is_head: bool) -> BaseModule:
    kind: Kind = "other"
    in_features = out_features = 0
    if isinstance(module, nn.Linear | QuantLinear):
        kind, in_features, out_features = "linear", module.in_features, module.out_features
    elif isinstance(module, Conv1D):
        kind, in_features, out_features = "conv1d", module.nx, module.nf
    elif isinstance(module, nn.Embedding):
        kind = "embedding"
    return BaseModule(path, kind, in_features, out_features, module, is_output, is_head)
