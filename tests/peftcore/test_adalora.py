"""AdaLoRA's own: the allocation of ranks step by step, the files of a pruned adapter, refusals.

What it shares with the other methods is in test_round_trip.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcore import (
    AdaLoraConfig,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.methods.adalora import RankAllocator
from peftcore.program import compile_adapter
from tests import tiny
from tests.peftcore.worlds import quiet

IDS = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "labels": IDS}
KEY = "base_model.model.model.layers.0.self_attn.q_proj"

SCHEDULES: dict[str, dict[str, Any]] = {
    "at once": {"init_r": 6, "target_r": 3, "total_step": 12},
    "three phases": {"init_r": 5, "target_r": 2, "total_step": 20, "tinit": 4, "tfinal": 6},
    "every third step": {"init_r": 4, "target_r": 1, "total_step": 16, "tfinal": 3, "deltaT": 3},
    "to nothing": {"init_r": 3, "target_r": 0, "total_step": 10, "tfinal": 4},
    "nearly none left": {"init_r": 8, "target_r": 1, "total_step": 12, "tfinal": 2, "beta1": 0.3},
}


def pair(**options: Any) -> tuple[peft.PeftModel, PeftModel]:
    """The same new adapter in peft and here."""
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], lora_alpha=32, **options
    )
    torch.manual_seed(3)
    with quiet():
        theirs = peft.get_peft_model(tiny.llama(), copy.deepcopy(config))
    torch.manual_seed(3)
    return theirs, get_peft_model(tiny.llama(), tiny.our_config(config))


def steps(model: Any, numbers: range) -> list[float]:
    """Train, with the allocation where a user of peft has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    model.train()
    losses = []
    for step in numbers:
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def kept(model: PeftModel) -> dict[str, list[bool]]:
    """As peft's `rank_pattern`, without the adapter's name."""
    return {
        f"{part.module.path}.lora_E": part.kept
        for part in model._parts["default"].modules  # type: ignore[attr-defined]
    }


def values(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{part.module.path}.lora_E": part.lora_E.detach()  # type: ignore[attr-defined]
        for part in model._parts["default"].modules
    }


def trained(name: str = "three phases") -> tuple[peft.PeftModel, PeftModel]:
    theirs, ours = pair(**SCHEDULES[name])
    last = SCHEDULES[name]["total_step"]
    steps(theirs, range(last + 1))
    steps(ours, range(last + 1))
    return theirs, ours


@pytest.mark.parametrize("name", SCHEDULES)
def test_allocation_is_pefts_at_every_step(name: str) -> None:
    theirs, ours = pair(**SCHEDULES[name])
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-2)
        for m in (theirs, ours)
    ]
    seen = set()
    for step in range(SCHEDULES[name]["total_step"] + 2):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = model(**BATCH).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=1e-4), step
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            expected = {k.replace(".default", ""): v for k, v in pattern.items()}
            assert kept(ours) == expected, step
        for path, value in values(ours).items():
            other = theirs.base_model.model.get_parameter(f"{path}.default")
            assert torch.equal(value == 0, other == 0), (step, path)
            torch.testing.assert_close(value, other.detach(), atol=1e-4, rtol=1e-3)
        seen.add(sum(map(sum, kept(ours).values())))
    assert len(seen) > 2, "ranks went away little by little"
    assert min(seen) == SCHEDULES[name]["target_r"] * 6


def test_it_is_called_on_either_model() -> None:
    ours = pair(**SCHEDULES["at once"])[1]
    other = copy.deepcopy(ours)
    for model, call in [
        (ours, ours.update_and_allocate),
        (other, other.base_model.update_and_allocate),
    ]:
        model(**BATCH).loss.backward()
        call(8)
        assert 18 <= sum(map(sum, kept(model).values())) < 36
    assert kept(ours) == kept(other)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_files_of_a_pruned_adapter_go_both_ways(name: str, tmp_path: Path) -> None:
    theirs, ours = trained(name)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
    configs, files = (
        [json.loads((tmp_path / who / tiny.CONFIG_NAME).read_text()) for who in ("theirs", "ours")],
        [load_file(tmp_path / who / tiny.WEIGHTS_NAME) for who in ("theirs", "ours")],
    )
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert any(v.shape[0] < SCHEDULES[name]["init_r"] for v in files[1].values())
    in_ours = PeftModel.from_pretrained(tiny.llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(in_ours), logits(theirs), atol=1e-4, rtol=1e-4)
    with quiet():
        in_peft = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(in_peft), logits(ours), atol=1e-4, rtol=1e-4)
    # and once more from what was read
    in_ours.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / tiny.CONFIG_NAME).read_text())
    assert again["rank_pattern"] == configs[0]["rank_pattern"]
    reread = load_file(tmp_path / "again" / tiny.WEIGHTS_NAME)
    assert all(torch.equal(reread[k], v) for k, v in files[0].items())


def test_a_pruned_adapter_compiles_to_fewer_ranks(tmp_path: Path) -> None:
    """A module that lost all its ranks has no update, and the rest keep their scale."""
    _, ours = trained("to nothing")
    part = ours._parts["default"].modules[0]
    part.keep([True, False, True])  # type: ignore[attr-defined]
    with torch.no_grad():
        part.lora_E.add_(0.5)  # type: ignore[union-attr, operator]
    part.keep([True, False, True])  # type: ignore[attr-defined]
    ours.save_pretrained(tmp_path)
    config = AdaLoraConfig.from_pretrained(tmp_path)
    tensors = TensorReader.from_file(tmp_path / tiny.WEIGHTS_NAME)
    program = compile_adapter(config, tensors, BaseModel.from_model(tiny.llama()))
    (update,) = program.primitives
    assert update.rank == 2  # type: ignore[union-attr]
    assert update.scale == pytest.approx(32 / 3, rel=1e-5)  # type: ignore[union-attr]


def test_a_pruned_adapter_can_be_trained_on(tmp_path: Path) -> None:
    """Less is taken from what is left; the pattern counts the triplets from the first training."""
    trained()[1].save_pretrained(tmp_path)
    before = AdaLoraConfig.from_pretrained(tmp_path).rank_pattern
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    config = model.peft_config["default"]
    assert isinstance(config, AdaLoraConfig)
    allocator = model.shared["default"]
    assert isinstance(allocator, RankAllocator)
    allocator.config = dataclasses.replace(config, target_r=1)
    steps(model, range(20))
    after = kept(model)
    assert before is not None
    assert sum(map(sum, after.values())) == 6 < sum(map(sum, before.values()))
    for path, rows in after.items():
        assert all(old or not new for old, new in zip(before[path], rows, strict=True))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model))


def test_a_checkpoint_is_loaded_into_the_adapter_that_wrote_it(tmp_path: Path) -> None:
    """Whatever ranks it had then and has now; the parameters stay those of the optimizer."""
    _, ours = pair(**SCHEDULES["three phases"])
    states = {}
    for name, numbers in [("early", range(5)), ("middle", range(5, 9)), ("late", range(9, 21))]:
        steps(ours, numbers)
        ours.save_pretrained(tmp_path / name)
        states[name] = logits(ours), sum(map(sum, kept(ours).values()))
    assert states["early"][1] > states["middle"][1] > states["late"][1]
    parameters = dict(ours.named_parameters())
    for name, other in itertools.permutations(states, 2):
        ours.load_adapter(tmp_path / other, "default", is_trainable=True)
        ours.load_adapter(tmp_path / name, "default", is_trainable=True)
        ours.eval()
        torch.testing.assert_close(logits(ours), states[name][0])
        assert sum(map(sum, kept(ours).values())) == states[name][1]
        ours.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
        torch.testing.assert_close(logits(again), states[name][0])
    assert all(p is parameters[n] for n, p in ours.named_parameters())


def test_a_pruned_adapters_state_goes_back_into_it() -> None:
    _, ours = trained()
    before, pattern = logits(ours), kept(ours)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(ours).items()}
    for part in ours._parts["default"].modules:
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(1.0)
    set_peft_model_state_dict(ours, state)
    assert torch.equal(logits(ours), before)
    assert kept(ours) == pattern


# -- the loss ------------------------------------------------------------------------------------


def test_orthogonality_is_in_the_loss_of_training_only(tmp_path: Path) -> None:
    theirs, ours = pair(total_step=9, orth_reg_weight=0.7)
    plain = tiny.llama()(**BATCH).loss.item()
    loss = ours(**BATCH).loss.item()
    assert loss == pytest.approx(theirs(**BATCH).loss.item(), abs=1e-5)
    assert loss > plain + 1
    with ours.disable_adapter():
        assert ours(**BATCH).loss.item() == pytest.approx(plain, abs=1e-6)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert loaded(**BATCH).loss.item() == pytest.approx(plain, abs=1e-6)


# -- refusals ------------------------------------------------------------------------------------


def test_training_needs_a_schedule() -> None:
    for options, field in [
        ({}, "total_step"),
        ({"total_step": 10, "tinit": 6, "tfinal": 4}, "tinit"),
    ]:
        config = AdaLoraConfig(target_modules=["q_proj"], **options)
        with pytest.raises(ConfigError) as caught:
            get_peft_model(tiny.llama(), config)
        assert caught.value.field == field
    with pytest.warns(UserWarning, match="init_r"):
        AdaLoraConfig(r=4)


def test_allocation_needs_gradients_and_an_adapter_that_allocates() -> None:
    _, ours = pair(total_step=9)
    with pytest.raises(ValueError, match=r"q_proj.lora_A has no gradient"):
        ours.update_and_allocate(0)
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"update_and_allocate: .*ADALORA"):
        lora.base_model.update_and_allocate(0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha_pattern", {"q_proj": 4}), ("use_rslora", True), ("use_dora", True)],
)
def test_what_peft_ignores_or_refuses_is_refused(option: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        config_from_dict({"peft_type": "ADALORA", "total_step": 9, option: value})
    assert caught.value.field == option


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 0},
        {"deltaT": 0},
        {"beta1": 1.0},
        {"orth_reg_weight": -0.1},
        {"init_r": 0},
        {"target_r": -1},
        {"total_step": 0},
        {"rank_pattern": {"a.lora_E": [1, 0]}},
        {"rank_pattern": {"a.lora_E": [True, False]}},
    ],
)
def test_wrong_values_name_the_field(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"peft_type": "ADALORA", "total_step": 9, **options})
    assert caught.value.field == next(iter(options))


def test_a_pattern_for_a_module_that_is_no_target_is_refused() -> None:
    pattern = {"model.layers.0.self_attn.k_proj.lora_E": [True] * 12}
    config = AdaLoraConfig(target_modules=["q_proj"], rank_pattern=pattern, total_step=9)
    with pytest.raises(ConfigError, match=r"rank_pattern: .*k_proj"):
        get_peft_model(tiny.llama(), config)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_E"])
@pytest.mark.parametrize("fault", ["shorter", "missing", "pruned"])
def test_a_file_that_does_not_fit_names_the_key(name: str, fault: str, tmp_path: Path) -> None:
    pair(total_step=9)[1].save_pretrained(tmp_path)
    path = tmp_path / tiny.WEIGHTS_NAME
    tensors = load_file(path)
    key = f"{KEY}.{name}"
    if fault == "shorter":
        tensors[key] = tensors[key][:-1].contiguous()
    elif fault == "missing":
        del tensors[key]
    else:  # as if fewer ranks were left, which the config does not say
        for k, v in tensors.items():
            tensors[k] = (v[:, :5] if "lora_B" in k else v[:5]).contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"^{KEY}\.lora_") as caught:
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert fault == "pruned" or caught.value.key == key
