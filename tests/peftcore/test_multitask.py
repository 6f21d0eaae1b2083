"""Multitask prompts: a task a sequence, starts from other prompts, one task's export.

What they share with the other methods is in test_round_trip, for one task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    LoraConfig,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    export_task,
    get_peft_model,
)
from peftcore.base import BaseModel
from peftcore.primitives import VirtualTokens
from peftcore.program import compile_adapter
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, quiet

IDS = torch.randint(0, 256, (4, 11), generator=torch.Generator().manual_seed(5))
TASKS = torch.tensor([2, 0, 2, 1])


def config(**options: Any) -> peft.MultitaskPromptTuningConfig:
    values = {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2, "task_type": "CAUSAL_LM"}
    return peft.MultitaskPromptTuningConfig(**(values | options))


def both(options: dict[str, Any], make: Callable = tiny.llama) -> tuple[peft.PeftModel, PeftModel]:
    with quiet():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(make(), config(**options))
    torch.manual_seed(3)
    return theirs, get_peft_model(make(), tiny.our_config(config(**options)))


def trained(model: Any, batch: dict[str, Tensor], steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any, tasks: Tensor | None = TASKS, ids: Tensor = IDS) -> Tensor:
    extra = {} if tasks is None else {"task_ids": tasks}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma3, tiny.gpt2])
def test_each_sequence_has_its_tasks_prompt(make: Callable, tmp_path: Path) -> None:
    theirs, ours = both({}, make)
    batch = {"input_ids": IDS, "labels": IDS, "task_ids": TASKS}
    with quiet():
        expected = trained(theirs, batch)
    assert trained(ours, batch) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(ours), logits(ours, TASKS.flip(0)), atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / tiny.WEIGHTS_NAME) for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    in_ours = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(in_ours), logits(theirs), atol=1e-4, rtol=1e-4)
    with quiet():
        in_peft = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(in_peft), logits(ours), atol=1e-4, rtol=1e-4)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    with quiet():
        expected_ids = theirs.generate(input_ids=IDS, task_ids=TASKS, **options)
    got = in_ours.generate(input_ids=IDS, task_ids=TASKS, **options)
    assert torch.equal(got, expected_ids)


def test_a_classifier_is_trained_beside_it(tmp_path: Path) -> None:
    theirs, ours = both({"task_type": "SEQ_CLS"}, tiny.bert)
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0]), "task_ids": TASKS}
    batch["attention_mask"] = torch.ones_like(IDS)
    with quiet():
        expected = trained(theirs, batch)
    assert trained(ours, batch) == pytest.approx(expected, abs=1e-4)
    export_task(ours, 1, tmp_path)
    with quiet():
        exported = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()
    expected_logits = logits(ours, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(logits(exported, None), expected_logits, atol=1e-5, rtol=1e-5)


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    _, ours = both({})
    batch = {"input_ids": IDS, "labels": IDS, "task_ids": TASKS}
    trained(ours, batch)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    before = logits(ours)
    assert trained(again, batch)[0] == pytest.approx(ours(**batch).loss.item(), abs=1e-5)
    assert not torch.allclose(logits(again), before, atol=1e-3)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"])
def test_a_prompt_starts_from_anothers_tasks_as_in_peft(start: str, tmp_path: Path) -> None:
    source, _ = both({})
    source.save_pretrained(tmp_path)
    options = {
        "num_tasks": 1,
        "prompt_tuning_init": start,
        "prompt_tuning_init_task": 2,
        "prompt_tuning_init_state_dict_path": str(tmp_path / tiny.WEIGHTS_NAME),
    }
    theirs, ours = both(options)
    tasks = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(logits(ours, tasks), logits(theirs, tasks), atol=1e-5, rtol=1e-5)


def test_a_prompt_starts_from_anothers_shared_rows_as_in_peft(tmp_path: Path) -> None:
    source, _ = both({})
    source.save_pretrained(tmp_path)
    options = {
        "num_tasks": 4,
        "prompt_tuning_init": "ONLY_SOURCE_SHARED",
        "prompt_tuning_init_state_dict_path": str(tmp_path / tiny.WEIGHTS_NAME),
    }
    theirs, ours = both(options)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init_state_dict_path": "x.bin"}, "state_dict_path: the source prompt's"),
        ({"prompt_tuning_init_task": 3}, "prompt_tuning_init_task: 3, but the source has 3 tasks"),
        ({"num_tasks": 2}, "num_tasks: 1 where the prompt starts from source tasks"),
    ],
)
def test_starts_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source, _ = both({})
    source.save_pretrained(tmp_path)
    values = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "num_virtual_tokens": 5,
        "num_ranks": 2,
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": str(tmp_path / tiny.WEIGHTS_NAME),
    }
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny.llama(), config_from_dict(values | options))


def test_a_task_is_exported_as_a_plain_prompt(tmp_path: Path) -> None:
    folder = tiny.save_random_adapter(tiny.llama(), config(), tmp_path / "all")
    ours = PeftModel.from_pretrained(tiny.llama(), folder, "many")
    base = BaseModel.from_model(tiny.llama())
    for task in range(3):
        export_task(ours, task, tmp_path / str(task), "many")
        expected = logits(ours, torch.full((4,), task))
        with quiet():
            theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / str(task)).eval()
        assert theirs.peft_config["default"].peft_type == "PROMPT_TUNING"
        torch.testing.assert_close(logits(theirs, None), expected, atol=1e-5, rtol=1e-5)
        file = SavedAdapter.read(tmp_path / str(task))
        program = compile_adapter(file.parsed(), file.reader(), base)
        assert program.num_virtual_tokens == 5


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    _, ours = both({})
    with pytest.raises(ValueError, match="task: 3, but 'default' has the tasks 0 to 2"):
        export_task(ours, 3, tmp_path)
    with pytest.raises(ValueError, match="adapter_name: 'other' is no MULTITASK"):
        export_task(ours, 0, tmp_path, "other")
    with pytest.raises(ValueError, match="adapter_name: 'default' is no MULTITASK"):
        export_task(get_peft_model(tiny.llama(), LoraConfig()), 0, tmp_path)


def test_one_task_is_served_and_several_say_how_to(tmp_path: Path) -> None:
    base = BaseModel.from_model(tiny.llama())
    folder = tiny.save_random_adapter(tiny.llama(), config(num_tasks=1), tmp_path / "one")
    file = SavedAdapter.read(folder)
    (tokens,) = compile_adapter(file.parsed(), file.reader(), base).primitives
    assert isinstance(tokens, VirtualTokens)
    shared, cols, rows = (file.tensors[k] for k in
        ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))  # fmt: skip
    torch.testing.assert_close(tokens.rows, shared * (cols[0] @ rows[0]))
    several = SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config(), tmp_path / "all"))
    with pytest.raises(UnsupportedError, match=r"num_tasks: 3 tasks .*export_task"):
        compile_adapter(several.parsed(), several.reader(), base)


def test_without_task_ids_it_says_so() -> None:
    _, ours = both({})
    with pytest.raises(ValueError, match="task_ids: required"):
        ours(IDS)


def test_a_wrong_shape_or_key_is_named(tmp_path: Path) -> None:
    folder = tiny.save_random_adapter(tiny.llama(), config(), tmp_path)
    tensors = load_file(folder / tiny.WEIGHTS_NAME)
    for changed, message in [
        ({"prefix_task_cols": tensors["prefix_task_cols"][:2]}, r"prefix_task_cols: shape \[2, 5"),
        ({"prompt_embeddings": torch.zeros(5, 32)}, r"prompt_embeddings: shape \[5, 32\]"),
    ]:
        save_file(copy.copy(tensors) | changed, folder / tiny.WEIGHTS_NAME)
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(tiny.llama(), folder)
    del tensors["prefix_task_rows"]
    save_file(tensors, folder / tiny.WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="prefix_task_rows: missing"):
        PeftModel.from_pretrained(tiny.llama(), folder)
