"""Random adapters of a model's shapes, for load tests: real files, meaningless weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from peftcore import (
    AdapterConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from peftcore.base import BaseModel
from peftcore.checkpoint import peft_format
from peftcore.parts import Parts

METHODS = ("lora", "dora", "ia3", "prefix", "prompt")

#: Not one of them, since it generates nothing: a LoRA with a head of NUM_LABELS classes.
CLASSIFIER = "classifier"
NUM_LABELS = 3

#: Of prefix and prompt tuning.
NUM_VIRTUAL_TOKENS = 16

#: Standard deviation of the tensors whose key ends so; A's is that of its input's width.
_STD = {"lora_B.weight": 0.01, "ia3_l": 0.05, "prompt_embeddings": 0.05, "score.weight": 0.05}


class RandomAdapter:
    """A float16 adapter of one method; drawn once, written any number of times with other bytes."""

    def __init__(self, model_folder: Path, method: str, *, rank: int, seed: int = 0) -> None:
        """
        Args:
            model_folder: what holds the model's config.json; its weights are read for DoRA only,
                whose magnitudes are norms of the base's rows.
            method: one of METHODS, or CLASSIFIER. LoRA and DoRA are on all linear layers, IA³ on
                its defaults.
            rank: of every module of LoRA and DoRA. seed: of the weights.
        """
        base = _base(model_folder, method)
        self.config = _config(method, rank).completed(base)
        with torch.device("cpu" if method == "dora" else "meta"):
            parts = self.config.build(base)
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {
            key: _draw(key, tensor, generator).to(torch.float16)
            for key, tensor in peft_format.state_dict(parts).items()
        }

    def write(self, folder: Path, variant: int = 0) -> Path:
        """Write PEFT's two files to `folder`; returns it.

        Args:
            variant: rolls the elements of every tensor by so many places. Variants differ in their
                bytes up to the largest tensor's number of elements.
        """
        tensors = {key: tensor.roll(variant) for key, tensor in self._tensors.items()}
        peft_format.write(folder, self.config, tensors, Parts())
        return folder


class RandomAdapters:
    """Numbered adapters of several methods in turn, no two of the same bytes."""

    def __init__(self, model_folder: Path, methods: Sequence[str], *, rank: int) -> None:
        """Args: as RandomAdapter's; adapter i is of method i modulo their number."""
        self.methods = tuple(methods)
        self._drawn = {
            method: RandomAdapter(model_folder, method, rank=rank) for method in set(methods)
        }

    def write(self, folder: Path, number: int) -> Path:
        """Write adapter `number` to `folder`; returns it."""
        method = self.methods[number % len(self.methods)]
        return self._drawn[method].write(folder, number)


def make_lora(model_folder: Path, folder: Path, *, rank: int, seed: int) -> Path:
    """Write a LoRA of `rank` on all linear layers of the model to `folder`; returns it.

    Args:
        model_folder: what holds the model's config.json; its weights are not read.
        rank: of every module. seed: of the weights, so that adapters differ.
    """
    return RandomAdapter(model_folder, "lora", rank=rank, seed=seed).write(folder)


def _base(model_folder: Path, method: str) -> BaseModel:
    if method == "dora":
        return BaseModel.from_model(AutoModelForCausalLM.from_pretrained(model_folder))
    config = AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        if method == CLASSIFIER:
            config.num_labels = NUM_LABELS
            return BaseModel.from_model(AutoModelForSequenceClassification.from_config(config))
        return BaseModel.from_model(AutoModelForCausalLM.from_config(config))


def _config(method: str, rank: int) -> AdapterConfig:
    task, n = "CAUSAL_LM", NUM_VIRTUAL_TOKENS
    match method:
        case "lora" | "dora":
            return LoraConfig(
                r=rank, lora_alpha=rank, target_modules="all-linear", use_dora=method == "dora",
                task_type=task, inference_mode=True,
            )  # fmt: skip
        case "classifier":
            return LoraConfig(
                r=rank, lora_alpha=rank, target_modules="all-linear", modules_to_save=["score"],
                task_type="SEQ_CLS", inference_mode=True,
            )  # fmt: skip
        case "ia3":
            return IA3Config(task_type=task, inference_mode=True)
        case "prefix":
            return PrefixTuningConfig(num_virtual_tokens=n, task_type=task, inference_mode=True)
        case "prompt":
            return PromptTuningConfig(num_virtual_tokens=n, task_type=task, inference_mode=True)
    raise ValueError(f"{method!r} is not one of {', '.join(METHODS)}")


def _draw(key: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if key.endswith("lora_magnitude_vector"):
        return like
    if key.endswith("lora_A.weight"):
        std = like.shape[1] ** -0.5
    else:
        std = next(std for ending, std in _STD.items() if key.endswith(ending))
    noise = torch.randn(like.shape, generator=generator) * std
    return 1 + noise if key.endswith("ia3_l") else noise
