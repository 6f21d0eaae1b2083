"""Random adapters: whole files by peft's reading, and no two of the same bytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loadtests.adapters import (
    CLASSIFIER,
    METHODS,
    NUM_LABELS,
    RandomAdapter,
    RandomAdapters,
    make_lora,
)
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from tests import tiny


@pytest.mark.parametrize("method", [*METHODS, CLASSIFIER])
def test_peft_finds_every_tensor(method: str, model_folder: Path, tmp_path: Path) -> None:
    adapter = RandomAdapter(model_folder, method, rank=3)
    assert adapter.write(tmp_path) == tmp_path
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(tmp_path)
        base = tiny.llama()
        if method == CLASSIFIER:
            base = tiny.for_task(base, "SEQ_CLS", NUM_LABELS)
        model = peft.get_peft_model(base, config)
        expected = peft.get_peft_model_state_dict(model)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in expected.items()}


@pytest.mark.parametrize("method", METHODS)
def test_variants_differ(method: str, model_folder: Path, tmp_path: Path) -> None:
    adapter = RandomAdapter(model_folder, method, rank=2)
    files = {(adapter.write(tmp_path, i) / WEIGHTS_NAME).read_bytes() for i in range(90)}
    assert len(files) == 90


def test_the_magnitudes_of_dora_are_the_norms_of_the_bases_rows(
    model_folder: Path, tmp_path: Path
) -> None:
    RandomAdapter(model_folder, "dora", rank=2).write(tmp_path)
    key = "model.layers.1.mlp.up_proj"
    found = load_file(tmp_path / WEIGHTS_NAME)[f"base_model.model.{key}.lora_magnitude_vector"]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    norms = base.get_submodule(key).weight.detach().norm(dim=1)
    torch.testing.assert_close(found.float(), norms, rtol=1e-3, atol=0)


def test_adapters_take_methods_in_turn(model_folder: Path, tmp_path: Path) -> None:
    adapters = RandomAdapters(model_folder, ["ia3", "prompt"], rank=2)
    folders = [adapters.write(tmp_path / str(i), i) for i in range(4)]
    kinds = [json.loads((f / CONFIG_NAME).read_text())["peft_type"] for f in folders]
    assert kinds == ["IA3", "PROMPT_TUNING"] * 2
    assert len({(f / WEIGHTS_NAME).read_bytes() for f in folders}) == 4


def test_loras_differ_by_seed(model_folder: Path, tmp_path: Path) -> None:
    one, other = (make_lora(model_folder, tmp_path / str(i), rank=2, seed=i) for i in range(2))
    assert (one / WEIGHTS_NAME).read_bytes() != (other / WEIGHTS_NAME).read_bytes()


def test_an_unknown_method_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="'relora' is not one of lora, dora"):
        RandomAdapter(model_folder, "relora", rank=2)
