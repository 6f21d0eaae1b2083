"""LoHa and LoKr: every shape that their matrices take, dropout that stays in training, refusals.

What they share with the other methods is in test_round_trip.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from torch import nn

from peftcore import (
    CheckpointError,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    get_peft_model,
)
from peftcore.base import BaseModule
from peftcore.methods.lokr import LoKrPart, factors
from peftcore.methods.lycoris import LycorisConfig
from peftcore.primitives import LowRank
from tests import tiny
from tests.peftcore.worlds import quiet

IDS = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
PREFIX = "base_model.model.model.layers.0."


def linear(n_in: int, n_out: int) -> BaseModule:
    return BaseModule("lin", "linear", n_in, n_out, nn.Linear(n_in, n_out))


def in_peft(config: LycorisConfig, module: BaseModule) -> nn.Module:
    """peft's layer of the same adapter on the same module."""
    theirs = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[config.peft_type]
    values = {k: v for k, v in config.to_dict().items() if k != "peft_type"}
    holder = nn.ModuleDict({"lin": copy.deepcopy(module.module)})
    return peft.get_peft_model(
        holder, theirs(**values | {"target_modules": ["lin"]})
    ).base_model.lin


@pytest.mark.parametrize("size", [1, 2, 7, 12, 36, 64, 96, 101, 128, 360, 1024])
def test_factors_are_pefts(size: int) -> None:
    for factor in [-1, *range(1, 2 * size if size < 100 else 40)]:
        assert factors(size, factor) == factorization(size, factor), factor


SHAPES = [(16, 16), (16, 48), (48, 16), (7, 30), (30, 7), (64, 64)]


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_every_form_of_lokr_is_pefts(n_in: int, n_out: int) -> None:
    """Whole or product, on either side, whichever way the low-rank update is shorter."""
    module = linear(n_in, n_out)
    forms = set()
    for rank, both, factor, init in itertools.product(
        [1, 2, 3, 8], [False, True], [-1, 2, 4], [True, False, "lycoris"]
    ):
        config = LoKrConfig(
            r=rank, alpha=5, decompose_both=both, decompose_factor=factor, init_weights=init
        )
        torch.manual_seed(1)
        theirs = in_peft(config, module)
        torch.manual_seed(1)
        part = LoKrPart(module, rank, 5 / rank, config)
        part.reset_parameters()
        names = dict(part.named_parameters())
        assert {f"{n}.default" for n in names} == {
            n for n, _ in theirs.named_parameters() if "lokr" in n
        }
        for name, parameter in names.items():
            other = theirs.get_parameter(f"{name}.default")
            assert torch.equal(parameter, other), name
            noise = torch.randn(parameter.shape)
            parameter.data.add_(noise)
            other.data.add_(noise)
        (update,) = part.primitives()
        delta = update.scale * update.b @ update.a
        torch.testing.assert_close(delta, theirs.get_delta_weight("default"), atol=1e-4, rtol=1e-4)
        assert update.rank <= min(n_in, n_out)
        forms.add(tuple(sorted(names)))
    assert len(forms) >= 2


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
def test_loha_has_no_more_rank_than_the_module(n_in: int, n_out: int, rank: int) -> None:
    module, config = linear(n_in, n_out), LoHaConfig(r=rank, alpha=5, init_weights=False)
    torch.manual_seed(1)
    theirs = in_peft(config, module)
    torch.manual_seed(1)
    part = config.part(module, rank, 5 / rank)
    part.reset_parameters()
    (update,) = part.primitives()
    assert update.rank == min(rank**2, n_in, n_out)
    expected = theirs.get_delta_weight("default")
    torch.testing.assert_close(update.scale * update.b @ update.a, expected)


@pytest.mark.parametrize("make", [LoHaConfig, LoKrConfig])
def test_dropout_is_drawn_in_training_only(make: type[LycorisConfig]) -> None:
    config = make(
        target_modules=["q_proj"], r=4, init_weights=False, module_dropout=0.5, rank_dropout=0.5
    )
    model = get_peft_model(tiny.llama(), config)
    (part, *_) = model._parts["default"].modules
    assert part.training
    drawn = [part.applied() for _ in range(40)]
    assert 5 < drawn.count([]) < 35
    rows = [p.b.abs().sum(dim=1).count_nonzero() for found in drawn for p in found]  # type: ignore[union-attr]
    assert all(10 < count < 54 for count in rows)
    model.eval()
    before = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, before)
    model.train()
    model.merge_adapter()  # whole, even now
    torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=2e-5, rtol=1e-5)


def test_other_dropout_stays_in_step_with_peft() -> None:
    """PEFT draws a number a module and step, whatever it is for; the base's dropout follows it."""
    base = tiny.llama(attention_dropout=0.4)
    config = peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=3, init_weights=False)
    losses = []
    for wrap in (
        lambda: peft.get_peft_model(copy.deepcopy(base), config),
        lambda: get_peft_model(copy.deepcopy(base), tiny.our_config(config)),
    ):
        with quiet():
            torch.manual_seed(3)
            model = wrap().train()
            losses.append(model(input_ids=IDS, labels=IDS).loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [LoHaConfig, LoKrConfig])
def test_a_conv1d_is_refused_by_name(make: type[LycorisConfig]) -> None:
    with pytest.raises(UnsupportedError, match=r"target_modules: .*c_attn is a Conv1D.*LORA"):
        get_peft_model(tiny.gpt2(), make())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LOHA", {"r": 0}),
        ("LOHA", {"rank_dropout": 1.5}),
        ("LOHA", {"module_dropout": -0.1}),
        ("LOHA", {"init_weights": "lycoris"}),
        ("LOKR", {"init_weights": "other"}),
        ("LOKR", {"decompose_factor": 0}),
        ("LOKR", {"decompose_factor": -2}),
        ("LOKR", {"alpha": "8"}),
        ("LOKR", {"layers_pattern": "h", "target_modules": ["q"]}),
    ],
)
def test_wrong_values_name_the_field(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"peft_type": method, **options})
    assert caught.value.field == next(iter(options))


@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (LoHaConfig(target_modules=["q_proj"], r=4), "hada_w1_a"),
        (LoHaConfig(target_modules=["q_proj"], r=4), "hada_w2_b"),
        (LoKrConfig(target_modules=["q_proj"], r=2), "lokr_w1"),
        (LoKrConfig(target_modules=["q_proj"], r=2), "lokr_w2_a"),
        (LoKrConfig(target_modules=["q_proj"], r=8), "lokr_w2"),
        (LoKrConfig(target_modules=["q_proj"], r=2, decompose_both=True), "lokr_w1_b"),
    ],
)
def test_a_file_that_does_not_fit_names_the_key(
    config: LycorisConfig, suffix: str, tmp_path: Path
) -> None:
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    path, key = tmp_path / tiny.WEIGHTS_NAME, f"{PREFIX}self_attn.q_proj.{suffix}"
    good = load_file(path)
    for bad in ({**good, key: good[key][1:].clone()}, {k: v for k, v in good.items() if k != key}):
        save_file(bad, path)
        with pytest.raises(CheckpointError) as caught:
            PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert caught.value.key == key


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    """The rank decides whether a matrix is whole: a file of another rank has other keys."""
    get_peft_model(tiny.llama(), LoKrConfig(target_modules=["q_proj"], r=2)).save_pretrained(
        tmp_path
    )
    LoKrConfig(target_modules=["q_proj"], r=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj\.lokr_w2: missing"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_what_is_served_is_low_rank() -> None:
    model = get_peft_model(tiny.llama(), LoKrConfig(target_modules=["q_proj"], r=2))
    assert {type(p) for p in model._parts["default"].primitives()} == {LowRank}
