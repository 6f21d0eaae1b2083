"""What the methods that put virtual tokens before the prompt share."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

from peftcore.config import AdapterConfig, strict
from peftcore.errors import ConfigError


@dataclass(config=strict, kw_only=True)
class PromptLearningConfig(AdapterConfig):
    """Fields that PEFT's prompt-learning configs share; training fills in those of the base.

    For a prefix, `num_attention_heads` counts key-value heads, and `token_dim` is their width
    together; for virtual tokens they are the model's attention heads and hidden size.
    """

    num_virtual_tokens: int = Field(gt=0, le=1 << 20)
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True

    def check_base(self, **expected: int) -> None:
        """Raises ConfigError where a field that is set differs from the base's value."""
        if self.num_transformer_submodules not in (None, 1):
            raise ConfigError(
                "num_transformer_submodules",
                f"{self.num_transformer_submodules}: only decoder models (1) are served",
            )
        for name, value in expected.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ConfigError(name, f"{given}, but the base model has {value}")


def fit_ids(ids: Sequence[int], length: int, field: str) -> list[int]:
    """`ids` cut, or repeated and cut, to `length`: how a text starts n virtual tokens.

    Raises ConfigError, naming `field`, where there are no ids.
    """
    if not ids:
        raise ConfigError(field, "holds no token")
    return (list(ids) * -(-length // len(ids)))[:length]
