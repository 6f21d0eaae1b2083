"""VeRA's shared matrices: drawn as peft draws them, saved or drawn again, counted never.

What it shares with the other methods is in test_round_trip.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcore import (
    CheckpointError,
    ConfigError,
    PeftModel,
    UnsupportedError,
    VeraConfig,
    config_from_dict,
    get_peft_model,
)
from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import config_from_json
from peftcore.primitives import LowRank
from peftcore.program import compile_adapter
from tests import tiny
from tests.peftcore.worlds import quiet

IDS = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
TARGETS = ["q_proj", "v_proj", "down_proj", "up_proj"]  # 64→64, 64→32, 96→64, 64→96
PREFIX = "base_model.model.model.layers.0."
SHARED = ("base_model.vera_A", "base_model.vera_B")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def theirs(**options: Any) -> peft.PeftModel:
    with quiet():
        config = peft.VeraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **options)
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny.llama(), config).eval()
    for name, parameter in model.named_parameters():
        if "vera_lambda_b" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("key", [0, 1, 12345, 2**40, -3])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_the_projection_is_pefts_bit_by_bit(key: int, rank: int) -> None:
    state = torch.get_rng_state()
    ours = get_peft_model(
        tiny.llama(), VeraConfig(target_modules=TARGETS, r=rank, projection_prng_key=key)
    )
    expected = theirs(r=rank, projection_prng_key=key).base_model
    projection = ours.shared["default"]
    assert projection.vera_A.shape == (rank, 96)
    assert projection.vera_B.shape == (96, rank)
    assert torch.equal(projection.vera_A, expected.vera_A["default"])  # type: ignore[arg-type]
    assert torch.equal(projection.vera_B, expected.vera_B["default"])  # type: ignore[arg-type]
    torch.set_rng_state(state)


@pytest.mark.parametrize("is_saved", [True, False])
def test_an_adapter_without_its_projection_is_the_same(is_saved: bool, tmp_path: Path) -> None:
    model = theirs(r=6, projection_prng_key=9, save_projection=is_saved)
    with quiet():
        model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / tiny.WEIGHTS_NAME)
    assert all((key in tensors) is is_saved for key in SHARED)
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / tiny.WEIGHTS_NAME)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) for k, v in tensors.items())
    # and served
    program = compile_adapter(
        config_from_json((tmp_path / tiny.CONFIG_NAME).read_bytes()),
        TensorReader.from_file(tmp_path / tiny.WEIGHTS_NAME),
        BaseModel.from_model(tiny.llama()),
    )
    for update in program.primitives:
        assert isinstance(update, LowRank)
        layer = model.base_model.model.get_submodule(update.module)
        expected = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(update.b @ update.a, expected, atol=1e-5, rtol=1e-5)


def test_a_saved_projection_wins_over_the_key(tmp_path: Path) -> None:
    """What is in the file is what was trained with, whatever would be drawn here."""
    model = theirs(r=6)
    with quiet():
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / tiny.CONFIG_NAME).read_text())
    config["projection_prng_key"] = 77
    (tmp_path / tiny.CONFIG_NAME).write_text(json.dumps(config))
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)


def test_the_projection_is_there_once_and_not_trained() -> None:
    model = get_peft_model(tiny.llama(), VeraConfig(target_modules=TARGETS, r=6))
    assert not any("vera_A" in name or "vera_B" in name for name, _ in model.named_parameters())
    assert [n for n, _ in model.named_buffers() if "vera" in n] == [
        "shared.default.vera_A",
        "shared.default.vera_B",
    ]
    other = copy.deepcopy(model)
    other.shared["default"].vera_A.zero_()  # type: ignore[operator]
    other._parts["default"].modules[0].vera_lambda_b.data.fill_(1.0)  # type: ignore[union-attr]
    (update, *_) = other._parts["default"].primitives()
    assert isinstance(update, LowRank)
    assert update.a.count_nonzero() == 0, "a copy's parts use the copy's projection"
    assert model.shared["default"].vera_A.count_nonzero() > 0  # type: ignore[operator]


def test_two_adapters_have_projections_of_their_own() -> None:
    """In peft the second must have the first's key and be no larger."""
    model = get_peft_model(tiny.llama(), VeraConfig(target_modules=["v_proj"], r=6))
    model.add_adapter("large", VeraConfig(target_modules=TARGETS, r=9, projection_prng_key=5))
    for name, part in [(n, p) for n, parts in model._parts.items() for p in parts.modules]:
        part.vera_lambda_b.data.fill_(0.1)  # type: ignore[union-attr, operator]
        (update,) = part.primitives()
        assert isinstance(update, LowRank)
        assert update.rank == (9 if name == "large" else 6)
    small = logits(model)
    model.set_adapter("large")
    assert not torch.equal(logits(model), small)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*SHARED, f"{PREFIX}mlp.up_proj.vera_lambda_b"])
def test_a_file_that_does_not_fit_names_the_key(key: str, tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), VeraConfig(target_modules=TARGETS, r=6)).save_pretrained(tmp_path)
    path = tmp_path / tiny.WEIGHTS_NAME
    good = load_file(path)
    for bad in ({**good, key: good[key][1:].clone()}, {k: v for k, v in good.items() if k != key}):
        save_file(bad, path)
        with pytest.raises(CheckpointError) as caught:
            PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert caught.value.key == key


def test_a_projection_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    """PEFT warns and draws another: which of the two was trained with?"""
    model = get_peft_model(tiny.llama(), VeraConfig(target_modules=TARGETS, r=6))
    model.save_pretrained(tmp_path)
    VeraConfig(target_modules=TARGETS, r=6, save_projection=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert caught.value.key in SHARED


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, ConfigError),
        ({"projection_prng_key": 2**64}, ConfigError),
        ({"projection_prng_key": 1.5}, ConfigError),
        ({"bias": "lora_only"}, ConfigError),
        ({"vera_dropout": 2.0}, ConfigError),
        ({"exclude_modules": ["q_proj"]}, UnsupportedError),
    ],
)
def test_wrong_values_name_the_field(options: dict[str, Any], error: type[ConfigError]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"peft_type": "VERA", **options})
    assert type(caught.value) is error
    assert caught.value.field == next(iter(options))
