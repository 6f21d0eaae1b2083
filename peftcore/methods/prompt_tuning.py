"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-tuning (Liu et al. 2021, 2103.10385).

Both are trained rows in place of n embedding rows before the prompt, at positions 0..n−1. P-tuning
computes them by an encoder while it trains; its file holds the encoder's output.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import register, strict
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods.prompt_learning import PROMPT_KEY, PromptLearningConfig, fit_ids
from peftcore.methods.training import TrainableAdapter, with_virtual_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftcore.base import BaseModel
    from peftcore.program import Primitive


@dataclass(config=strict, kw_only=True)
class _VirtualTokenConfig(PromptLearningConfig):
    def compile(self, base: BaseModel, tensors: TensorReader) -> list[Primitive]:
        from peftcore.program import VirtualTokens

        self.check_base(token_dim=base.hidden_size, num_layers=len(base.kv_shapes))
        shape = (self.num_virtual_tokens, base.hidden_size)
        return [VirtualTokens(tensors.take(PROMPT_KEY, shape))]

    def _filled(self, model: PreTrainedModel, base: BaseModel) -> dict[str, Any]:
        """The fields that a new adapter takes from its base, which must not contradict it."""
        num_layers = len(base.kv_shapes)
        self.check_base(token_dim=base.hidden_size, num_layers=num_layers)
        return {
            "token_dim": base.hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": model.config.get_text_config().num_attention_heads,
            "num_transformer_submodules": 1,
        }


@register
@dataclass(config=strict, kw_only=True)
class PromptTuningConfig(_VirtualTokenConfig):
    """Config of a trained prompt; fields and defaults as PEFT's `PromptTuningConfig`."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        }
    )

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> VirtualTokenAdapter:
        """A new adapter on `model`. See `peftcore.methods.training.Trainable`.

        The initial text is split by `tokenizer`, whatever `tokenizer_name_or_path` names.
        """
        config = dataclasses.replace(self, **self._filled(model, base))
        n = self.num_virtual_tokens
        embedding = nn.Embedding(n, base.hidden_size)
        match self.prompt_tuning_init:
            case "RANDOM":
                return VirtualTokenAdapter(model, config, embedding)
            case "SAMPLE_VOCAB":
                ids = torch.randint(0, model.config.get_text_config().vocab_size, (n,)).tolist()
            case "TEXT":
                text_ids = tokenizer(self.prompt_tuning_init_text or "")["input_ids"]
                ids = fit_ids(text_ids, n, "prompt_tuning_init_text")
                name = self.tokenizer_name_or_path or self.base_model_name_or_path
                # PEFT refuses to read a config that starts from a text and names no tokenizer.
                config = dataclasses.replace(
                    config, tokenizer_name_or_path=name or tokenizer.name_or_path
                )
            case other:
                raise ConfigError("prompt_tuning_init", f"{other!r}: RANDOM, SAMPLE_VOCAB or TEXT")
        with torch.no_grad():
            embedding.weight.copy_(model.get_input_embeddings()(torch.tensor(ids)))
        return VirtualTokenAdapter(model, config, embedding)


@register
@dataclass(config=strict, kw_only=True)
class PromptEncoderConfig(_VirtualTokenConfig):
    """Config of P-tuning; fields and defaults as PEFT's `PromptEncoderConfig`."""

    peft_type: ClassVar[str] = "P_TUNING"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "encoder_reparameterization_type",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_dropout",
        }
    )

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def attach(
        self, model: PreTrainedModel, base: BaseModel, tokenizer: PreTrainedTokenizerBase
    ) -> VirtualTokenAdapter:
        """A new adapter on `model`. See `peftcore.methods.training.Trainable`."""
        if self.encoder_reparameterization_type != "MLP":
            raise UnsupportedError(
                "encoder_reparameterization_type",
                f"{self.encoder_reparameterization_type!r} is not trainable here: use 'MLP'",
            )
        width = base.hidden_size
        hidden = self.encoder_hidden_size or width
        config = dataclasses.replace(self, **self._filled(model, base), encoder_hidden_size=hidden)
        encoder = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )
        return VirtualTokenAdapter(
            model, config, nn.Embedding(self.num_virtual_tokens, width), encoder
        )


class VirtualTokenAdapter(TrainableAdapter):
    """Virtual tokens in training: n rows, or what an encoder makes of them."""

    config: PromptLearningConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptLearningConfig,
        embedding: nn.Embedding,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__(model, config)
        self.embedding = embedding
        self.encoder = encoder or nn.Identity()

    def _rows(self) -> Tensor:
        return self.encoder(self.embedding.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> Tensor:
        batch, n = len(input_ids), self.config.num_virtual_tokens
        embeds = self.model.get_input_embeddings()(input_ids)
        rows = self._rows().to(embeds.dtype).expand(batch, -1, -1)
        return self._logits(
            keep + n,
            inputs_embeds=torch.cat([rows, embeds], dim=1),
            attention_mask=with_virtual_mask(attention_mask, n),
            use_cache=False,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {PROMPT_KEY: self._rows().detach()}
