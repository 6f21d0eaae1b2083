"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before the sequence's.

The file holds them flattened, `[n, layers · 2 · kv_heads · head_dim]`, and already projected. The
keys are used as they are: no rotary embedding; the first real token stands at position n.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import DynamicCache

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import register, strict
from peftcore.errors import ConfigError
from peftcore.methods.prompt_learning import PROMPT_KEY, PromptLearningConfig, fit_ids
from peftcore.methods.training import TrainableAdapter, with_virtual_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftcore.base import BaseModel
    from peftcore.program import Primitive


@register
@dataclass(config=strict, kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Config of a prefix; fields and defaults as PEFT's `PrefixTuningConfig`."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"encoder_hidden_size", "prefix_projection", "init_weights"}
    )

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        from peftcore.program import PrefixKV

        num_layers, num_heads, head_dim = self._kv_shape(base)
        n = self.num_virtual_tokens
        flat = tensors.take(PROMPT_KEY, (n, num_layers * 2 * num_heads * head_dim))
        kv = flat.view(n, num_layers, 2, num_heads, head_dim)
        return [PrefixKV(i, kv[:, i, 0], kv[:, i, 1]) for i in range(num_layers)]

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> PrefixAdapter:
        """A new adapter on `model`. See `peftcore.methods.training.Trainable`."""
        num_layers, num_heads, head_dim = self._kv_shape(base)
        config = dataclasses.replace(
            self,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            token_dim=num_heads * head_dim,
            num_transformer_submodules=1,
            encoder_hidden_size=self.encoder_hidden_size or num_heads * head_dim,
        )
        return PrefixAdapter(model, config, (num_layers, 2, num_heads, head_dim))

    def _kv_shape(self, base: BaseModel) -> tuple[int, int, int]:
        """(layers, key-value heads, head dim) of `base`. Raises ConfigError where they differ."""
        if len(set(base.kv_shapes)) != 1 or base.kv_shapes[0][1] != base.kv_shapes[0][2]:
            raise ConfigError(
                "peft_type",
                "PREFIX_TUNING needs keys and values of one shape in every layer, "
                "which this base model does not have",
            )
        num_layers, (num_heads, head_dim, _) = len(base.kv_shapes), base.kv_shapes[0]
        self.check_base(
            num_layers=num_layers, num_attention_heads=num_heads, token_dim=num_heads * head_dim
        )
        return num_layers, num_heads, head_dim


class PrefixAdapter(TrainableAdapter):
    """A prefix in training: rows of keys and values, or under `prefix_projection` an MLP's."""

    config: PrefixTuningConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PrefixTuningConfig,
        kv_shape: tuple[int, int, int, int],
    ) -> None:
        """`kv_shape`: (layers, 2, key-value heads, head dim), what one row of the file holds."""
        super().__init__(model, config)
        self._kv_shape = kv_shape
        _, _, num_heads, head_dim = kv_shape
        width, row = num_heads * head_dim, torch.Size(kv_shape).numel()
        hidden = config.encoder_hidden_size or width
        self.transform: nn.Sequential | None = None
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.num_virtual_tokens, width)
            last = nn.Linear(hidden, row)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last)
            zeroed = [last.weight, last.bias]
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, row)
            zeroed = [self.embedding.weight]
        if config.init_weights == "zero":
            for parameter in zeroed:
                nn.init.zeros_(parameter)

    def start_from_text(self, ids: list[int]) -> None:
        """Start from the keys and values that the base model computes for a text.

        Far closer to a useful prefix than PEFT's random rows, which at first drown the prompt.

        Args:
            ids: the text's tokens; cut, or repeated and cut, to `num_virtual_tokens`.
        """
        if self.transform is not None:
            raise ConfigError("init_text", "a projected prefix cannot start from a text")
        ids = fit_ids(ids, self.config.num_virtual_tokens, "init_text")
        with torch.no_grad():
            cache = self.model(torch.tensor([ids]), use_cache=True).past_key_values
            # Per layer [2, heads, n, head_dim], then [n, layers, 2, heads, head_dim].
            kv = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
            rows = torch.stack(kv).permute(3, 0, 1, 2, 4).flatten(1)
            self.embedding.weight.copy_(rows)

    def _rows(self) -> Tensor:
        rows = self.embedding.weight
        return rows if self.transform is None else self.transform(rows)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        batch, n = len(input_ids), self.config.num_virtual_tokens
        kv = self._rows().to(self.model.dtype).view(n, *self._kv_shape).permute(1, 2, 3, 0, 4)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(kv):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), i)
        mask = with_virtual_mask(attention_mask, n)
        return self._logits(keep, input_ids=input_ids, attention_mask=mask, past_key_values=cache)

    def tensors(self) -> dict[str, Tensor]:
        return {PROMPT_KEY: self._rows().detach()}
