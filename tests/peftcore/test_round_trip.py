"""Every method against HF peft: training, files both ways, generation, counts, merging.

The base, the config, the seed and the data are the same; what is compared is peft's own result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from peftcore import PeftModel, get_peft_model
from tests import tiny
from tests.peftcore.worlds import quiet

STEPS = 20


@dataclass(frozen=True)
class Base:
    """A tiny model, a batch for its task, and peft's configs for it."""

    model: PreTrainedModel
    task: str
    batch: dict[str, Tensor]

    def configs(self) -> dict[str, peft.PeftConfig]:
        return tiny.peft_configs(self.model.config.model_type, self.task)


def causal(make: Callable[[], PreTrainedModel]) -> Base:
    ids = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return Base(make(), "CAUSAL_LM", {"input_ids": ids, "attention_mask": mask, "labels": labels})


def encoder(task: str) -> Base:
    ids = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if task != "FEATURE_EXTRACTION":  # there peft drops them with a warning
        batch["token_type_ids"] = torch.zeros_like(ids)
    if task == "SEQ_CLS":
        batch["labels"] = torch.tensor([0, 2, 1])
    elif task == "TOKEN_CLS":
        batch["labels"] = (ids % 3).masked_fill(mask == 0, -100)
    return Base(tiny.bert(task), task, batch)


BASES: dict[str, Callable[[], Base]] = {
    "llama": lambda: causal(tiny.llama),
    "gpt2": lambda: causal(tiny.gpt2),
    "gemma3": lambda: causal(tiny.gemma3),
    "bert-seq": lambda: encoder("SEQ_CLS"),
    "bert-token": lambda: encoder("TOKEN_CLS"),
    "bert-feature": lambda: encoder("FEATURE_EXTRACTION"),
}
_made: dict[str, Base] = {}


def base_of(name: str) -> Base:
    if name not in _made:
        _made[name] = BASES[name]()
    return _made[name]


#: What peft itself cannot train: it targets the head that it also saves whole, and it puts no
#: labels before a token classifier's. Of trained tokens' config a token classifier wants modules to
#: save, and an encoder hands no task to a multitask prompt.
PEFT_CANNOT = {
    ("bert-token", "lora-r8-all"),
    ("bert-token", "prompt"),
    ("bert-token", "p-tuning"),
    ("bert-token", "multitask"),
    ("bert-feature", "multitask"),
    ("bert-token", "tokens"),
    ("bert-token", "tokens-drawn"),
}

#: Under `bias="all"` peft also writes the biases of a head that it saves whole anyway.
TWICE = (".modules_to_save.bias", ".original_module.bias")

TASKS = {"bert-seq": "SEQ_CLS", "bert-token": "TOKEN_CLS", "bert-feature": "FEATURE_EXTRACTION"}
MODEL_TYPES = {"llama": "llama", "gpt2": "gpt2", "gemma3": "gemma3_text"}


def cases() -> list[Any]:
    return [
        pytest.param(base, method, id=f"{base}-{method}")
        for base in BASES
        for method in tiny.peft_configs(MODEL_TYPES.get(base, "bert"), TASKS.get(base, "CAUSAL_LM"))
        if (base, method) not in PEFT_CANNOT
    ]


@dataclass
class Trained:
    """The same adapter trained by both, from the same seed on the same batch."""

    base: Base
    theirs: peft.PeftModel
    ours: PeftModel
    losses: list[tuple[float, float]]


def train(model: Any, batch: dict[str, Tensor], steps: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    model.train()
    for step in range(steps):
        # For dropout; torch.manual_seed takes 2 ms, for devices that there are not.
        torch.default_generator.manual_seed(100 + step)
        optimizer.zero_grad()
        outputs = model(**batch)
        loss = outputs.loss if "labels" in batch else outputs.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


_trained: dict[tuple[str, str], Trained] = {}


def trained(base_name: str, method: str) -> Trained:
    key = (base_name, method)
    if key not in _trained:
        base = base_of(base_name)
        config = base.configs()[method]
        if config.peft_type == "MULTITASK_PROMPT_TUNING":
            task_ids = torch.zeros(len(base.batch["input_ids"]), dtype=torch.long)
            base = dataclasses.replace(base, batch={**base.batch, "task_ids": task_ids})
        with quiet():
            torch.manual_seed(3)
            theirs = peft.get_peft_model(copy.deepcopy(base.model), copy.deepcopy(config))
            torch.manual_seed(3)
            ours = get_peft_model(copy.deepcopy(base.model), tiny.our_config(config))
            expected = train(theirs, base.batch, STEPS)
        got = train(ours, base.batch, STEPS)
        _trained[key] = Trained(base, theirs, ours, list(zip(expected, got, strict=True)))
    return _trained[key]


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if not hasattr(model, "peft_config"):
        inputs.pop("task_ids", None)
    with torch.inference_mode():
        outputs = model(**inputs)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


@pytest.mark.parametrize(("base", "method"), cases())
def test_the_loss_curve_is_pefts(base: str, method: str) -> None:
    for step, (expected, got) in enumerate(trained(base, method).losses):
        assert got == pytest.approx(expected, abs=1e-4), f"step {step}"
    first, last = trained(base, method).losses[0][0], trained(base, method).losses[-1][0]
    assert first != last


@pytest.mark.parametrize(("base", "method"), cases())
def test_files_go_both_ways(base: str, method: str, tmp_path: Path) -> None:
    both = trained(base, method)
    with quiet():
        both.theirs.save_pretrained(tmp_path / "theirs")
        both.ours.save_pretrained(tmp_path / "ours")
        theirs = load_file(tmp_path / "theirs" / tiny.WEIGHTS_NAME)
        ours = load_file(tmp_path / "ours" / tiny.WEIGHTS_NAME)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items() if not k.endswith(TWICE)
        }
        in_peft = peft.PeftModel.from_pretrained(
            copy.deepcopy(both.base.model), tmp_path / "ours"
        ).eval()
    in_ours = PeftModel.from_pretrained(copy.deepcopy(both.base.model), tmp_path / "theirs")
    batch = both.base.batch
    expected = output(both.ours, batch)
    torch.testing.assert_close(output(in_peft, batch), expected, atol=1e-5, rtol=1e-5)
    expected = output(both.theirs, batch)
    torch.testing.assert_close(output(in_ours, batch), expected, atol=1e-5, rtol=1e-5)
    base_alone = output(both.base.model, batch)
    changed = output(in_ours, batch)[:, -base_alone.shape[1] :]
    assert (changed - base_alone).abs().max() > 1e-3


@pytest.mark.parametrize(("base", "method"), cases())
def test_parameters_are_counted_as_peft_counts(base: str, method: str) -> None:
    both = trained(base, method)
    assert both.ours.get_nb_trainable_parameters() == both.theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(("base", "method"), [c for c in cases() if "bert" not in c.values[0]])
def test_generation_is_pefts(base: str, method: str) -> None:
    both = trained(base, method)
    ids = both.base.batch["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    if "task_ids" in both.base.batch:
        options["task_ids"] = both.base.batch["task_ids"][:1]
    with quiet():
        expected = both.theirs.generate(input_ids=ids, **options)
    assert torch.equal(both.ours.generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize(("base", "method"), cases())
def test_merging_changes_nothing_and_unmerging_restores(base: str, method: str) -> None:
    both = trained(base, method)
    batch = both.base.batch
    model = copy.deepcopy(both.ours)
    before = output(model, batch)
    if model.active_peft_config.is_prompt_learning:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(output(model, batch), before, atol=5e-5, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(both.base.model, batch))
    assert torch.equal(output(model, batch), before)
    merged = model.merge_and_unload()
    assert type(merged) is type(both.base.model)
    assert not any("AdapterLayer" in type(m).__name__ for m in merged.modules())
    torch.testing.assert_close(output(merged, batch), before, atol=5e-5, rtol=1e-5)
