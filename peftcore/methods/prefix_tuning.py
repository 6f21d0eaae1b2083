"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before the sequence's.

The file holds them flattened, `[n, layers · 2 · kv_heads · head_dim]`, and already projected. The
keys are used as they are: no rotary embedding; the first real token stands at position n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import register, strict
from peftcore.errors import ConfigError
from peftcore.methods.prompt_learning import PromptLearningConfig
from peftcore.parts import PROMPT_KEY, Prompt, assign
from peftcore.primitives import PrefixKV, Primitive

if TYPE_CHECKING:
    from peftcore.base import BaseModel


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

    def parts(self, base: BaseModel) -> Iterator[Prompt]:
        yield Prefix(self, self._kv_shape(base))

    def completed(self, base: BaseModel) -> PrefixTuningConfig:
        num_layers, num_heads, head_dim = self._kv_shape(base)
        return dataclasses.replace(
            self,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            token_dim=num_heads * head_dim,
            num_transformer_submodules=1,
            encoder_hidden_size=self.encoder_hidden_size or num_heads * head_dim,
        )

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


class Prefix(Prompt):
    """A prefix: rows of keys and values, or in training under `prefix_projection` an MLP's.

    Key: `prompt_embeddings` `[n, layers · 2 · kv_heads · head_dim]`, projected.
    """

    is_kv = True

    def __init__(self, config: PrefixTuningConfig, kv_shape: tuple[int, int, int]) -> None:
        """`kv_shape`: (layers, key-value heads, head dim)."""
        n = config.num_virtual_tokens
        super().__init__(n)
        num_layers, num_heads, head_dim = self.kv_shape = kv_shape
        width = num_heads * head_dim
        row = num_layers * 2 * width
        hidden = config.encoder_hidden_size or width
        self.zero = config.init_weights == "zero"
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(n, width)
            self.transform = nn.Sequential(
                nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, row)
            )
        else:
            self.embedding = nn.Embedding(n, row)

    def reset_parameters(self) -> None:
        if self.zero:
            last = self.embedding if self.transform is None else self.transform[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def rows(self, task_ids: Tensor | None = None) -> Tensor:
        rows = self.embedding.weight
        return rows if self.transform is None else self.transform(rows)

    def kv(self) -> Tensor:
        """`[layers, 2, kv_heads, n, head_dim]`: keys, already rotated, and values."""
        num_layers, num_heads, head_dim = self.kv_shape
        rows = self.rows().view(-1, num_layers, 2, num_heads, head_dim)
        return rows.permute(1, 2, 3, 0, 4)

    def primitives(self) -> list[Primitive]:
        kv = self.kv().transpose(2, 3)
        return [PrefixKV(i, keys, values) for i, (keys, values) in enumerate(kv)]

    def load(self, tensors: TensorReader) -> None:
        num_layers, num_heads, head_dim = self.kv_shape
        shape = (self.num_virtual_tokens, num_layers * 2 * num_heads * head_dim)
        rows = tensors.take(PROMPT_KEY, shape)
        if self.transform is not None:
            self.transform = None
            self.embedding = nn.Embedding(*shape, device="meta")
        assign(self, "embedding.weight", rows)

    def encoder_state(self) -> dict[str, Tensor] | None:
        return None if self.transform is None else self.state_dict()
