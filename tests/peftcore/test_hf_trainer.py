"""HF `Trainer` with our `PeftModel`: it trains, resumes and loads the best as with peft's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peftcore
from tests import tiny
from tests.peftcore.worlds import quiet

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "lora_dropout": 0.1}
PATIENT = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}


def rows(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """A task that can be learned: is the first token small, middling or large?"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (count, 8), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) // 84}
        for row in ids
    ]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 12,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "seed": 0,
        "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(**(arguments | options)),
        train_dataset=rows(),
        eval_dataset=rows(16, 1),
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def both(tmp_path: Path, **options: Any) -> tuple[Trainer, Trainer]:
    """The same run with peft and here."""
    found = []
    for name, package in [("theirs", peft), ("ours", peftcore)]:
        set_seed(0)
        with quiet():
            model = package.get_peft_model(
                tiny.bert(), package.LoraConfig(**CONFIG, task_type="SEQ_CLS")
            )
            run = trainer(model, tmp_path / name, **options)
            run.train()
        found.append(run)
    return found[0], found[1]


def test_the_same_run_as_pefts(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **PATIENT, load_best_model_at_end=True, save_total_limit=3)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    assert ours.state.best_model_checkpoint is not None
    assert Path(ours.state.best_model_checkpoint).name == (
        Path(str(theirs.state.best_model_checkpoint)).name
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-4)
    for step in (4, 8, 12):
        files = [
            {p.name for p in (tmp_path / who / f"checkpoint-{step}").iterdir()} - {"README.md"}
            for who in ("ours", "theirs")
        ]
        assert files[0] == files[1]
        assert "adapter_model.safetensors" in files[0]
        assert "model.safetensors" not in files[0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path) -> Trainer:
        set_seed(0)
        config = peftcore.LoraConfig(**CONFIG, task_type="SEQ_CLS")  # type: ignore[arg-type]
        return trainer(peftcore.get_peft_model(tiny.bert(), config), folder, **PATIENT)

    whole = run(tmp_path)
    whole.train()
    again = run(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert losses(again)[-4:] == pytest.approx(losses(whole)[-4:], abs=1e-6)
    state, expected = again.model.state_dict(), whole.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        peftcore.IA3Config(task_type="SEQ_CLS"),
        peftcore.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        peftcore.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"
        ),
    ],
    ids=lambda c: c.peft_type,
)
def test_other_methods_resume_and_load_the_best(
    config: peftcore.PeftConfig, tmp_path: Path
) -> None:
    def run() -> Trainer:
        set_seed(0)
        model = peftcore.get_peft_model(tiny.bert(), config)
        return trainer(model, tmp_path, **PATIENT, load_best_model_at_end=True)

    whole = run()
    whole.train()
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-5)


def test_a_prefix_is_refused_when_the_trainer_turns_checkpointing_on(tmp_path: Path) -> None:
    config = peftcore.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    run = trainer(
        peftcore.get_peft_model(tiny.bert(), config), tmp_path, activation_checkpointing=True
    )
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        run.train()


def test_a_quantized_base_trains(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path / "base")
    for quantization in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        with quiet():
            base = AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "base",
                num_labels=3,
                quantization_config=BitsAndBytesConfig(
                    **quantization, bnb_4bit_compute_dtype=torch.float32
                ),
            )
            base = peftcore.prepare_model_for_kbit_training(base)
            config = peftcore.LoraConfig(**CONFIG, task_type="SEQ_CLS")  # type: ignore[arg-type]
            run = trainer(peftcore.get_peft_model(base, config), tmp_path / "run")
            run.train()
        curve = losses(run)
        assert sum(curve[-4:]) < sum(curve[:4])


def test_it_works_where_peft_is_not_installed(tmp_path: Path) -> None:
    """And leaves adapter files in the checkpoint, not the model."""
    script = f"""
import importlib.metadata, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "peft" else find_spec(name, *a)
sys.modules["peft"] = None
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import is_peft_available
assert not is_peft_available()
from peftcore import LoraConfig, get_peft_model
base = BertForSequenceClassification(BertConfig(hidden_size=32, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, vocab_size=50, num_labels=2))
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
rows = [dict(input_ids=torch.arange(6) + i, labels=i % 2) for i in range(8)]
options = dict(output_dir={str(tmp_path)!r}, max_steps=2, save_steps=1, report_to="none",
    use_cpu=True, disable_tqdm=True)
Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows).train()
names = {{p.name for p in (Path({str(tmp_path)!r}) / "checkpoint-2").iterdir()}}
assert "adapter_model.safetensors" in names and "model.safetensors" not in names, names
Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows).train(
    resume_from_checkpoint=True)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip().endswith("done"), done.stderr
