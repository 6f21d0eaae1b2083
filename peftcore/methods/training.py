"""The trainable side that all methods share: an adapter's parameters on a frozen base model.

Knows modules and tensors; nothing of data, optimizers or files.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import PREFIX
from peftcore.config import AdapterConfig


class TrainableAdapter(nn.Module, ABC):
    """One adapter in training. Owns its parameters; the base model is frozen and shared.

    Attributes:
        model: the base model, with the adapter's layers in it where the method has any.
        config: the adapter's config, complete: what PEFT would derive from the base is filled in.
    """

    def __init__(self, model: PreTrainedModel, config: AdapterConfig) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config = config
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        """The logits of the next token at some positions.

        Args:
            input_ids: `[batch, len]` token ids, padded on the right.
            attention_mask: `[batch, len]`, 1 for a token and 0 for padding.
            keep: `[k]` int64 positions in `input_ids`.

        Returns:
            `[batch, k, vocab]` logits; for the other positions none are computed.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under their keys in PEFT's file, detached."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _logits(self, keep: Tensor, **inputs: Any) -> Tensor:
        if self._trims:
            return self.model(**inputs, logits_to_keep=keep).logits
        return self.model(**inputs).logits[:, keep]


class AdapterLayer(nn.Module):
    """A linear module of the base and what the adapter adds to it.

    The names of its own parameters are those of PEFT's file, after the module's path.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("base_layer.")
        }


class LayerAdapter(TrainableAdapter):
    """An adapter made of layers that stand in the place of the base's own."""

    def __init__(
        self, model: PreTrainedModel, config: AdapterConfig, layers: Mapping[str, AdapterLayer]
    ) -> None:
        """Put `layers`, by module path, into `model`."""
        super().__init__(model, config)
        self.layers = dict(layers)
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        return self._logits(
            keep, input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{path}.{name}": parameter.detach()
            for path, layer in self.layers.items()
            for name, parameter in layer.own_parameters().items()
        }


@runtime_checkable
class Trainable(Protocol):
    """What a config class has whose method can be trained here."""

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> TrainableAdapter:
        """Freeze `model` and attach a new adapter to it, initialized as PEFT initializes it.

        Raises:
            ConfigError: the config does not fit the model.
            UnsupportedError: an option that can be served but not trained here.
        """


def with_virtual_mask(attention_mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """`attention_mask` `[batch, len]` with ones for the virtual tokens before it."""
    return torch.cat(
        [attention_mask.new_ones(len(attention_mask), num_virtual_tokens), attention_mask], 1
    )
