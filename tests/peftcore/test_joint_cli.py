"""`python -m peftcore.train.joint`: a file of jobs, and what their folders hold afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from peftcore import PeftModel
from peftcore.quant import quantize_model
from peftcore.train.joint_cli import load_joint_recipe, main, train_jointly
from peftcore.train.recipe import RecipeError
from peftcore.train.report import SUMMARY_NAME
from tests import tiny

JOBS: dict[str, Any] = {
    "letters": {
        "method": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]},
        "steps": 12, "eval_rows": 4, "eval_steps": 4, "lr": 0.02,
    },
    "scaled": {"method": {"peft_type": "IA3"}, "epochs": 1.5, "batch_size": 8},
    "before": {
        "method": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
        "init_text": "say", "steps": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and data."""
    folder = tmp_path_factory.mktemp("joint")
    tiny.llama(intermediate_size=128).save_pretrained(folder / "base")
    tiny.hf_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"prompt": f"say {c}", "completion": c * (2 + i % 5)} for i, c in enumerate("abcdefgh" * 4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    return folder


def write(folder: Path, output: Path, **changes: Any) -> Path:
    values = {
        "model": str(folder / "base"), "quantization": "nf4", "output": str(output),
        "max_tokens": 200, "defaults": {"data": str(folder / "rows.jsonl"), "batch_size": 4},
        "jobs": JOBS,
    }  # fmt: skip
    path = output.parent / "jobs.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_each_job_leaves_an_adapter_and_a_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, tmp_path / "out")
    main([str(path)])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == set(JOBS)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    quantize_model(base, "nf4")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        alone = base(ids).logits
    for name, (steps, rows) in {
        "letters": (12, 28), "scaled": (6, 32), "before": (4, 32),
    }.items():  # fmt: skip
        summary = json.loads((tmp_path / "out" / name / SUMMARY_NAME).read_text())
        assert summary == printed[name]
        assert (summary["steps"], summary["num_rows"]) == (steps, rows)
        assert summary["quantization"] == "nf4"
        assert summary["base_model"] == "base"
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / name)
        assert model.peft_type == JOBS[name]["method"]["peft_type"]
        with torch.no_grad():
            assert not torch.allclose(model(ids).logits, alone, atol=1e-3)
    assert printed["letters"]["final_eval"]["loss"] < printed["letters"]["train_loss"] + 2
    with pytest.raises(SystemExit, match="holds an adapter"):
        main([str(path)])
    main([str(path), "--overwrite"])


def test_a_job_that_fails_leaves_the_others_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = {**JOBS, "scaled": JOBS["letters"] | {"lr": 1e38}}
    with pytest.raises(SystemExit) as failure:
        main([str(write(folder, tmp_path / "out", jobs=jobs))])
    assert failure.value.code == 1
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) == {"letters", "before"}
    assert "scaled failed: the" in printed.err
    assert not (tmp_path / "out" / "scaled").exists()


def test_what_was_learned_until_an_interrupt_is_kept(folder: Path, tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    recipe = load_joint_recipe(write(folder, tmp_path / "out"))
    made = train_jointly(recipe, stop=stop, progress=False)
    for name, summary in made.items():
        assert not isinstance(summary, str)
        assert summary.interrupted
        assert summary.steps == 1
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": {}}, "jobs: none"),
        ({"jobs": None}, "jobs: a mapping"),
        ({"jobs": {"default": {}}}, "'default' cannot be"),
        ({"jobs": {"a/b": {}}}, "'a/b' cannot be"),
        ({"jobs": {"a": {}}}, r"jobs\.a: method"),
        ({"jobs": {"a": JOBS["scaled"] | {"quantization": "int8"}}}, r"jobs\.a\.quantization: of"),
        ({"jobs": {"a": JOBS["scaled"] | {"packing": True}}}, r"jobs\.a\.packing: not for"),
        ({"jobs": {"a": JOBS["scaled"] | {"task": "SEQ_CLS"}}}, r"jobs\.a\.task"),
        ({"steps": 3}, "steps: not known here"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_joint_recipe(write(folder, tmp_path / "out", **changes))
