"""What the tests of peftcore share: a tiny model, and every method's adapter saved by peft."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig, config_from_dict
from peftcore.program import AdapterProgram, compile_adapter
from tests import tiny

#: Per world, the names of its adapters.
NAMES = {model_type: list(tiny.peft_configs(model_type)) for model_type in ("llama", "gpt2")}


def each_adapter(
    among: Container[str] | None = None, but: Container[str] = ()
) -> pytest.MarkDecorator:
    """Parametrizes a test by the pairs of `world` and `name` that there are.

    Args:
        among: only adapters of these names; None: all.
        but: none of these names.
    """
    pairs = [
        pytest.param(model_type, name, id=f"{model_type}-{name}")
        for model_type, names in NAMES.items()
        for name in names
        if (among is None or name in among) and name not in but
    ]
    return pytest.mark.parametrize(("world", "name"), pairs, indirect=["world"])


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns of things that are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in peft's files, read without peftcore; to be changed and compiled."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        config = json.loads((folder / tiny.CONFIG_NAME).read_text())
        return cls(config, load_file(folder / tiny.WEIGHTS_NAME))

    def changed(
        self, tensors: dict[str, Tensor | None] | None = None, **config: Any
    ) -> SavedAdapter:
        """A copy with other config values, and other tensors: None takes one away."""
        merged = self.tensors | (tensors or {})
        return SavedAdapter(
            self.config | config, {k: v for k, v in merged.items() if v is not None}
        )

    def parsed(self) -> AdapterConfig:
        return config_from_dict(self.config)

    def reader(self) -> TensorReader:
        return TensorReader(self.tensors)

    def compile(self, base: BaseModel) -> AdapterProgram:
        return compile_adapter(self.parsed(), self.reader(), base)


@dataclass(frozen=True)
class World:
    """A tiny base, and the folder of each adapter of `tiny.peft_configs` by its name."""

    model: PreTrainedModel
    base: BaseModel
    folders: dict[str, Path]

    @classmethod
    def make(cls, model: PreTrainedModel, root: Path) -> World:
        folders = {}
        for seed, (name, config) in enumerate(tiny.peft_configs(model.config.model_type).items()):
            folders[name] = tiny.save_random_adapter(model, config, root / name, seed)
        return cls(model, BaseModel.from_model(model), folders)

    def saved(self, name: str) -> SavedAdapter:
        """Skips the test where peft has no such adapter on this base."""
        if name not in self.folders:
            pytest.skip(f"no {name} on {self.base.model_type}")
        return SavedAdapter.read(self.folders[name])

    def save(self, config: peft.PeftConfig, folder: Path) -> SavedAdapter:
        """Another adapter of peft's on this base."""
        return SavedAdapter.read(tiny.save_random_adapter(self.model, config, folder))

    def in_peft(self, name: str) -> peft.PeftModel:
        """A copy of the base with the adapter, as peft loads it."""
        with quiet():
            model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), self.folders[name])
        return model.eval()


#: LoRA's options that replace or scale something.
NOT_ADDING_LORA = [
    "lora-saved", "lora-head-saved", "lora-tokens", "lora-tokens-tied", "lora-tokens-apart",
]  # fmt: skip


def can_be_mixed(name: str) -> bool:
    adding = ("lora", "adalora", "vera", "loha", "lokr")
    return name.startswith(adding) and name not in NOT_ADDING_LORA
