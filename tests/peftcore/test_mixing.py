"""`add_weighted_adapter` against HF peft's, and what it refuses."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftcore import IA3Config, LoraConfig, MixtureError, PeftModel, get_peft_model
from peftcore.mixing import COMBINATIONS
from tests import tiny
from tests.peftcore.worlds import quiet

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(5))
#: The first has all, so that modules come in the same order in both.
TARGETS = [["q_proj", "v_proj", "o_proj", "down_proj"], ["q_proj", "o_proj"], ["q_proj", "v_proj"]]


def pair(configs: list[peft.PeftConfig], tmp_path: Path) -> tuple[peft.PeftModel, PeftModel]:
    """The same adapters a0, a1, … in peft and here."""
    base = tiny.llama()
    folders = [
        tiny.save_random_adapter(base, config, tmp_path / f"a{i}", seed=i)
        for i, config in enumerate(configs)
    ]
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[0], "a0")
        for i, folder in enumerate(folders[1:], 1):
            theirs.load_adapter(folder, f"a{i}")
    ours = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], "a0")
    for i, folder in enumerate(folders[1:], 1):
        ours.load_adapter(folder, f"a{i}")
    return theirs.eval(), ours


def lora(r: int = 4, i: int = 0, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=r, lora_alpha=3 + i, target_modules=TARGETS[i], task_type="CAUSAL_LM", **options
    )


def compare(theirs: peft.PeftModel, ours: PeftModel, **options: Any) -> None:
    names, weights = ["a0", "a1", "a2"], [0.7, -0.4, 1.3]
    for model in (theirs, ours):
        generator = torch.Generator().manual_seed(11)
        bernoulli = partial(torch.bernoulli, generator=generator)  # dare draws; peft draws more
        with quiet(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bernoulli", bernoulli)
            model.add_weighted_adapter(names, weights, "mixed", **options)
            model.set_adapter("mixed")
    with torch.inference_mode():
        expected, got = theirs(IDS).logits, ours(IDS).logits
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-5)
    with torch.inference_mode(), ours.disable_adapter():
        assert (got - ours(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("combination_type", COMBINATIONS)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_every_combination_is_pefts(combination_type: str, sign: str, tmp_path: Path) -> None:
    theirs, ours = pair([lora(i=i) for i in range(3)], tmp_path)
    compare(
        theirs,
        ours,
        combination_type=combination_type,
        density=0.6,
        majority_sign_method=sign,
    )
    a, b = theirs.peft_config["mixed"], ours.peft_config["mixed"]
    assert isinstance(b, LoraConfig)
    assert (b.r, b.lora_alpha, set(b.target_modules or ())) == (
        a.r, a.lora_alpha, set(a.target_modules),
    )  # fmt: skip


@pytest.mark.parametrize("combination_type", ["cat", "svd", "ties_svd"])
def test_ranks_may_differ(combination_type: str, tmp_path: Path) -> None:
    theirs, ours = pair([lora(r=r, i=i) for i, r in enumerate([3, 8, 5])], tmp_path)
    compare(theirs, ours, combination_type=combination_type, density=0.5)


@pytest.mark.parametrize("options", [{"svd_rank": 2}, {"svd_clamp": 0.9}])
def test_the_options_of_svd_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair([lora(i=i) for i in range(3)], tmp_path)
    compare(theirs, ours, combination_type="svd", **options)


def test_ia3_is_added_up_as_in_peft(tmp_path: Path) -> None:
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs, ours = pair([config] * 3, tmp_path)
    compare(theirs, ours)


def test_cat_is_the_exact_sum(tmp_path: Path) -> None:
    _, ours = pair([lora(r=r, i=i) for i, r in enumerate([3, 8, 5])], tmp_path)
    ours.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "sum", combination_type="cat")
    ours.set_adapter("sum")
    with torch.inference_mode():
        summed = ours(IDS).logits
        ours.set_adapter(["a0", "a1"])
        torch.testing.assert_close(summed, ours(IDS).logits, atol=1e-5, rtol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"]), "a")
    model.add_adapter("b", LoraConfig(r=8, target_modules=["q_proj"]))
    model.add_adapter("dora", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    model.add_adapter("ia3", IA3Config())
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["a", "b"], {"combination_type": "linear"}, "combination_type: linear needs .* 4, 8"),
        (["a", "b"], {"combination_type": "ties"}, "density"),
        (["a", "b"], {"combination_type": "mean"}, "combination_type: 'mean' is not one of"),
        (["a", "dora"], {}, "adapters: 'dora' has use_dora"),
        (["a", "ia3"], {}, r"only LORA, or only IA3, can be combined"),
        ([], {}, "adapters: name at least one"),
    ]
    for names, options, message in cases:
        with pytest.raises(MixtureError, match=message):
            model.add_weighted_adapter(names, [1.0] * len(names), "new", **options)
    with pytest.raises(ValueError, match="weights: 1 for 2"):
        model.add_weighted_adapter(["a", "b"], [1.0], "new")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new")
    with pytest.raises(ValueError, match="'b' is on this model already"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b")
    assert set(model.peft_config) == {"a", "b", "dora", "ia3"}
