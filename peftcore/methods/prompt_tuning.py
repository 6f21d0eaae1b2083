"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691), P-tuning (Liu et al. 2021, 2103.10385) and
multitask prompt tuning (Wang et al. 2023, 2303.02861).

All are trained rows in place of n embedding rows before the prompt, at positions 0..n−1. P-tuning
computes them by an encoder while it trains; its file holds the encoder's output. A multitask prompt
is one shared prompt, each task's own being its product with a low-rank matrix of the task:

    rows(t) = P ⊙ (cols[t] @ rows[t])
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoTokenizer

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import register, strict
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods.prompt_learning import PromptLearningConfig, fit_ids
from peftcore.parts import PROMPT_KEY, Prompt, assign
from peftcore.primitives import Primitive, VirtualTokens

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule


class PromptTuningInit(StrEnum):
    """What a prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(StrEnum):
    """What a prompt for several tasks starts from."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(StrEnum):
    """The encoder that P-tuning trains."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(config=strict, kw_only=True)
class _VirtualTokenConfig(PromptLearningConfig):
    def parts(self, base: BaseModel) -> Iterator[Prompt]:
        self.check_base(token_dim=base.hidden_size, num_layers=len(base.kv_shapes))
        yield self._prompt(base)

    @abstractmethod
    def _prompt(self, base: BaseModel) -> VirtualTokenPrompt:
        """The prompt, its parameters not initialized."""

    def completed(self, base: BaseModel) -> Self:
        num_layers = len(base.kv_shapes)
        self.check_base(token_dim=base.hidden_size, num_layers=num_layers)
        return dataclasses.replace(
            self,
            token_dim=base.hidden_size,
            num_layers=num_layers,
            num_attention_heads=base.num_attention_heads,
            num_transformer_submodules=1,
        )


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

    @field_validator("prompt_tuning_init", mode="before")
    @classmethod
    def _plain_init(cls, value: Any) -> Any:
        return value.value if isinstance(value, Enum) else value

    def _prompt(self, base: BaseModel) -> VirtualTokenPrompt:
        return VirtualTokenPrompt(self, base)

    def initial_ids(self, embedding: BaseModule) -> list[int] | None:
        """Token ids whose embeddings the prompt starts from; None for a random start."""
        n = self.num_virtual_tokens
        match self.prompt_tuning_init:
            case "RANDOM":
                return None
            case "SAMPLE_VOCAB":
                vocab_size = len(embedding.module.weight)  # type: ignore[arg-type]
                return torch.randint(0, vocab_size, (n,)).tolist()
            case "TEXT":
                name = self.tokenizer_name_or_path or self.base_model_name_or_path
                if not name:
                    raise ConfigError("tokenizer_name_or_path", "required to start from a text")
                if not self.prompt_tuning_init_text:
                    raise ConfigError("prompt_tuning_init_text", "required to start from a text")
                kwargs = dict(self.tokenizer_kwargs or {})
                kwargs.pop("trust_remote_code", None)  # a config does not decide to run code
                tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
                ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
                return fit_ids(ids, n, "prompt_tuning_init_text")
        raise ConfigError(
            "prompt_tuning_init",
            f"{self.prompt_tuning_init!r} is not one of RANDOM, SAMPLE_VOCAB, TEXT",
        )


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

    @field_validator("encoder_reparameterization_type", mode="before")
    @classmethod
    def _plain_type(cls, value: Any) -> Any:
        return value.value if isinstance(value, Enum) else value

    def _prompt(self, base: BaseModel) -> VirtualTokenPrompt:
        prompt = VirtualTokenPrompt(self, base)
        if not self.inference_mode:
            prompt.encoder = self._encoder(base.hidden_size)
        return prompt

    def completed(self, base: BaseModel) -> Self:
        config = super().completed(base)
        hidden = self.encoder_hidden_size or base.hidden_size
        return dataclasses.replace(config, encoder_hidden_size=hidden)

    def _encoder(self, width: int) -> nn.Module:
        hidden = self.encoder_hidden_size or width
        match self.encoder_reparameterization_type:
            case "MLP":
                return nn.Sequential(
                    nn.Linear(width, hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, width),
                )
            case "LSTM":
                lstm = nn.LSTM(
                    width,
                    hidden,
                    num_layers=self.encoder_num_layers,
                    dropout=self.encoder_dropout,
                    bidirectional=True,
                    batch_first=True,
                )
                return nn.Sequential(
                    lstm,
                    _FirstOutput(),
                    nn.Linear(2 * hidden, 2 * hidden),
                    nn.ReLU(),
                    nn.Linear(2 * hidden, width),
                )
        raise UnsupportedError(
            "encoder_reparameterization_type",
            f"{self.encoder_reparameterization_type!r} is not one of MLP, LSTM",
        )


class _FirstOutput(nn.Module):
    """An LSTM's outputs, without its state."""

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


@register
@dataclass(config=strict, kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Config of a prompt for several tasks; fields and defaults as PEFT's."""

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    training_only: ClassVar[frozenset[str]] = PromptTuningConfig.training_only | {
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
    }

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = Field(1, gt=0, le=1 << 16)
    num_tasks: int | None = Field(1, gt=0, le=1 << 16)

    def _prompt(self, base: BaseModel) -> VirtualTokenPrompt:
        return MultitaskPrompt(self, base)


class VirtualTokenPrompt(Prompt):
    """n virtual tokens, or in training what an encoder makes of them.

    Key: `prompt_embeddings` `[n, hidden]`.
    """

    def __init__(self, config: PromptLearningConfig, base: BaseModel) -> None:
        super().__init__(config.num_virtual_tokens)
        self.config = config
        self.base = base
        self.embedding = nn.Embedding(config.num_virtual_tokens, base.hidden_size)
        self.encoder: nn.Module | None = None

    def reset_parameters(self) -> None:
        if not isinstance(self.config, PromptTuningConfig):
            return
        embedding = self.base.modules[self.base.input_embedding]
        ids = self.config.initial_ids(embedding)
        if ids is not None:
            with torch.no_grad():
                device = embedding.module.weight.device
                rows = embedding.module(torch.tensor(ids, device=device))  # type: ignore[arg-type]
                self.embedding.weight.copy_(rows)

    def rows(self, task_ids: Tensor | None = None) -> Tensor:
        rows = self.embedding.weight
        if self.encoder is None:
            return rows
        return self.encoder(rows[None])[0]

    def primitives(self) -> list[Primitive]:
        return [VirtualTokens(self.rows())]

    def load(self, tensors: TensorReader) -> None:
        self.encoder = None
        assign(
            self, "embedding.weight", tensors.take(PROMPT_KEY, tuple(self.embedding.weight.shape))
        )

    def encoder_state(self) -> dict[str, Tensor] | None:
        return None if self.encoder is None else self.state_dict()


class MultitaskPrompt(VirtualTokenPrompt):
    """A shared prompt and a low-rank matrix for each task.

    Keys: `prompt_embeddings` `[n, hidden]`, `prefix_task_cols` `[tasks, n, ranks]`,
    `prefix_task_rows` `[tasks, ranks, hidden]`.
    """

    config: MultitaskPromptTuningConfig

    def __init__(self, config: MultitaskPromptTuningConfig, base: BaseModel) -> None:
        super().__init__(config, base)
        tasks, ranks = config.num_tasks or 1, config.num_ranks or 1
        cols = (tasks, config.num_virtual_tokens, ranks)
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, cols))
        self.prefix_task_rows = nn.Parameter(
            torch.normal(0, 0.02, (tasks, ranks, base.hidden_size))
        )

    def reset_parameters(self) -> None:
        source = {"AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"}
        if self.config.prompt_tuning_init not in source:
            return super().reset_parameters()
        path = self.config.prompt_tuning_init_state_dict_path
        if path is None or not path.endswith(".safetensors"):
            raise ConfigError(
                "prompt_tuning_init_state_dict_path",
                "the source prompt's adapter_model.safetensors is required "
                f"for {self.config.prompt_tuning_init}",
            )
        tensors = TensorReader.from_file(path)
        shape = tuple(self.embedding.weight.shape)
        self.embedding.weight.data = tensors.take(PROMPT_KEY, shape)
        if self.config.prompt_tuning_init == "ONLY_SOURCE_SHARED":
            return None
        for name in ("prefix_task_cols", "prefix_task_rows"):
            parameter = getattr(self, name)
            num_tasks = len(tensors.peek(name)) if tensors.has(name) else 1
            every = tensors.take(name, (num_tasks, *parameter.shape[1:]))
            if self.config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                start = every.mean(dim=0, keepdim=True)
            else:
                task = self.config.prompt_tuning_init_task or 0
                if not 0 <= task < num_tasks:
                    raise ConfigError(
                        "prompt_tuning_init_task", f"{task}, but the source has {num_tasks} tasks"
                    )
                start = every[task : task + 1]
            if len(parameter) != 1:
                raise ConfigError("num_tasks", "1 where the prompt starts from source tasks")
            parameter.data = start.clone()

    def rows(self, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise ValueError("task_ids: required for a multitask prompt, one for each sequence")
        return self.embedding.weight * (
            self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        )

    def task_rows(self, task: int) -> Tensor:
        """`[n, hidden]`, the prompt of one task."""
        return self.rows(torch.tensor([task], device=self.prefix_task_cols.device))[0]

    def primitives(self) -> list[Primitive]:
        if len(self.prefix_task_cols) != 1:
            raise UnsupportedError(
                "num_tasks",
                f"{len(self.prefix_task_cols)} tasks are served as as many adapters: save each "
                "with peftcore.export_task(model, task, folder)",
            )
        return [VirtualTokens(self.task_rows(0))]

    def saved(self) -> Any:
        yield PROMPT_KEY, self.embedding.weight
        yield "prefix_task_cols", self.prefix_task_cols
        yield "prefix_task_rows", self.prefix_task_rows

    def load(self, tensors: TensorReader) -> None:
        super().load(tensors)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            assign(self, name, tensors.take(name, tuple(getattr(self, name).shape)))
