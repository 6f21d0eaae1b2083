"""LN tuning's own: its default targets, modules that are no norms, refusals.

What it shares with the other methods is in test_round_trip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as DEFAULTS

from peftcore import CheckpointError, ConfigError, LNTuningConfig, PeftModel, get_peft_model
from peftcore.base import BaseModel
from peftcore.methods.targets import LN_TUNING_TARGETS
from peftcore.primitives import ModuleOverride
from peftcore.program import compile_adapter
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, quiet

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(5))
KEY = "base_model.model.model.norm.ln_tuning_layers.weight"


def test_default_targets_are_pefts() -> None:
    for model_type, names in LN_TUNING_TARGETS.items():
        assert set(names) == set(DEFAULTS[model_type]), model_type


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "model.norm"],
        ["embed_tokens", "lm_head"],
        r".*layers\.[01]\.(input_layernorm|self_attn\.k_proj)",
    ],
)
def test_other_modules_are_trained_whole_as_in_peft(targets: Any, tmp_path: Path) -> None:
    config = peft.LNTuningConfig(target_modules=targets)
    tiny.save_random_adapter(tiny.llama(), config, tmp_path)
    with quiet(), torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
        expected = theirs(IDS).logits
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, tiny.llama()(IDS).logits, atol=1e-2)
    file = SavedAdapter.read(tmp_path)
    program = compile_adapter(file.parsed(), file.reader(), BaseModel.from_model(tiny.llama()))
    assert {type(p) for p in program.primitives} == {ModuleOverride}
    merged = ours.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_default_needs_targets() -> None:
    with pytest.raises(ConfigError, match=r"target_modules: not set.*'bert'"):
        get_peft_model(tiny.bert(), LNTuningConfig(task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["mlp"]}, "layers.0.mlp holds other modules: name those"),
        ({"target_modules": ["act_fn"]}, "act_fn has no parameters"),
        ({"target_modules": ["absent"]}, "matches no module"),
        ({"modules_to_save": ["absent"]}, "modules_to_save: 'absent' matches no module"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny.llama(), LNTuningConfig(**options))


def test_a_wrong_shape_or_key_is_named(tmp_path: Path) -> None:
    folder = tiny.save_random_adapter(tiny.llama(), peft.LNTuningConfig(), tmp_path)
    file = SavedAdapter.read(folder)
    base = BaseModel.from_model(tiny.llama())
    long = file.changed({KEY: torch.ones(65)})
    with pytest.raises(CheckpointError, match=rf"{KEY}: shape \[65\]"):
        compile_adapter(long.parsed(), long.reader(), base)
    plain = "base_model.model.model.norm.weight"
    moved = file.changed({KEY: None, plain: file.tensors[KEY]})
    with pytest.raises(CheckpointError, match=f"{KEY}: missing"):
        compile_adapter(moved.parsed(), moved.reader(), base)


def test_two_adapters_in_one_batch_compute_what_each_does_alone(tmp_path: Path) -> None:
    model = tiny.gemma3()
    targets = ["q_norm", "post_attention_layernorm", "norm"]
    for seed, name in enumerate(["a", "b"]):
        config = peft.LNTuningConfig(target_modules=targets)
        tiny.save_random_adapter(model, config, tmp_path / name, seed)
    ours = PeftModel.from_pretrained(model, tmp_path / "a", "a")
    ours.load_adapter(tmp_path / "b", "b")
    ids = IDS.repeat(2, 1)
    with torch.no_grad():
        mixed = ours(ids, adapter_names=["a", "b", "b", "__base__"]).logits
        for row, name in [(0, "a"), (1, "b"), (2, "b")]:
            ours.set_adapter(name)
            alone = ours(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-4)
        with ours.disable_adapter():
            torch.testing.assert_close(mixed[3], ours(ids[3:]).logits[0], atol=1e-4, rtol=1e-4)
