"""`polypeft-train`: the loss, resuming, stopping, what is left behind, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from peftcore import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peftcore.train.cli import main
from peftcore.train.collate import padded, side_by_side
from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.report import SUMMARY_NAME
from peftcore.train.rows import DataError
from peftcore.train.run import CHECKPOINTS, EVENTS, train
from peftcore.train.samples import IGNORED
from peftcore.train.trainer import StopWhenAsked, only_rows, summed_loss
from tests import tiny
from tests.serving import serve

#: peft's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny.llama().save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"say {c}", "completion": c * (2 + i % 5)} for i, c in enumerate("abcdefgh" * 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: Path, data: Path, output: Path, **changes: Any) -> Recipe:
    values = {
        "model": str(base), "data": str(data), "output": output, "method": LORA, "batch_size": 4,
        "steps": 6, "lr": 1e-2, "eval_rows": 8,
    }  # fmt: skip
    return Recipe(**(values | changes))


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def scalars(output: Path, tag: str) -> list[float]:
    """A curve in TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output / EVENTS))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(tag)]


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, task_type="CAUSAL_LM"),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"]),
        IA3Config(task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        AdaLoraConfig(total_step=9, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "lora-head", "ia3", "prefix", "prompt", "adalora"],
)
def test_dropping_rows_before_the_head_changes_nothing(make: Any, config: PeftConfig) -> None:
    """Loss and gradients are those of the model's own loss over all positions."""
    features = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
        {"input_ids": [15, 16, 17], "labels": [IGNORED, IGNORED, 17]},
    ]
    batch = padded(features)
    model = get_peft_model(make(), dataclasses.replace(config)).eval()
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    total, count = summed_loss(model, batch)
    loss = total / count
    term = model.regularization()
    loss = loss if term is None else loss + term
    loss.backward()
    assert count == 4
    torch.testing.assert_close(loss, model(**batch).loss)
    for parameter, other in zip(
        (p for p in model.parameters() if p.requires_grad), expected, strict=True
    ):
        torch.testing.assert_close(parameter.grad, other)


def test_only_the_wanted_rows_get_logits() -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM"))
    ids = torch.arange(12).view(2, 6)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 1] = keep[1, 4] = keep[1, 5] = True
    with only_rows(model, keep):
        logits = model(ids).logits
    assert logits.shape == (1, 3, tiny.VOCAB)
    torch.testing.assert_close(logits[0], model(ids).logits[keep])


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3])
def test_packed_samples_do_not_see_each_other(make: Any) -> None:
    """Logits, loss and gradients equal those of the samples alone."""
    generator = torch.Generator().manual_seed(0)
    features = []
    for length in (5, 9, 3, 7, 20):
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        features.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    model = get_peft_model(make(), LoraConfig(r=4, task_type="CAUSAL_LM")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    alone = [model(input_ids=torch.tensor([f["input_ids"]])).logits[0] for f in features]
    batch = side_by_side([{"samples": features[:3]}, {"samples": features[3:]}])
    packed = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    rows = [packed[0, :5], packed[0, 5:14], packed[0, 14:17], packed[1, :7], packed[1, 7:27]]
    for got, expected in zip(rows, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    grads = []
    for inputs in (batch, padded(features)):
        model.zero_grad()
        total, count = summed_loss(model, inputs)
        assert count == sum(len(f["input_ids"]) - 1 for f in features)
        total.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(base: Path, data: Path, tmp_path: Path) -> None:
    summary = train(recipe(base, data, tmp_path / "out"), progress=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", SUMMARY_NAME, "loss.png", EVENTS,
    }  # fmt: skip
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert len(scalars(tmp_path / "out", "train/loss")) == 6
    written = json.loads((tmp_path / "out" / SUMMARY_NAME).read_text())
    assert written == dataclasses.asdict(summary)
    assert summary.steps == 6
    assert (summary.num_rows, summary.num_eval_rows) == (24, 8)
    assert summary.initial_eval is not None
    assert summary.final_eval is not None
    assert summary.final_eval["loss"] < summary.initial_eval["loss"]
    assert summary.tokens_per_second > 0
    assert summary.peak_memory_bytes > 1 << 26
    assert summary.base_model == "tiny-llama"
    assert len(summary.base_sha256) == len(summary.data_sha256) == 64
    assert not summary.interrupted
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama", "no path of this machine"
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "out").eval()
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({"peft_type": "IA3"}, {}),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, {"init_text": "hello there"}),
        (
            {
                "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4,
                "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abc",
            },
            {},
        ),
        ({"peft_type": "ADALORA", "total_step": 6, "tfinal": 1, "tinit": 1}, {}),
        ({"peft_type": "BOTTLENECK"}, {}),
        (LORA, {"packing": True, "gradient_accumulation": 2, "max_len": 64}),
        (LORA, {"quantization": "nf4", "save_dtype": "float16"}),
        (LORA, {"quantization": "int8", "gradient_checkpointing": True}),
        (LORA, {"dtype": "bfloat16", "loss_on": "everything"}),
    ],
    ids=lambda v: v.get("peft_type", "") if "peft_type" in v else "-".join(map(str, v.values())),
)  # fmt: skip
def test_methods_and_options(
    method: dict[str, Any], options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    run = recipe(base, data, tmp_path, method=method, **options)
    summary = train(run, progress=False)
    assert summary.initial_eval is not None
    assert summary.final_eval is not None
    assert summary.final_eval["loss"] < summary.initial_eval["loss"]
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert model.peft_type == method["peft_type"]
    if "save_dtype" in options:
        tensors = load_file(tmp_path / tiny.WEIGHTS_NAME).values()
        assert {t.dtype for t in tensors} == {torch.float16}


def test_the_same_seed_is_the_same_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        train(recipe(base, data, tmp_path / name), progress=False)
        files.append((tmp_path / name / tiny.WEIGHTS_NAME).read_bytes())
    train(recipe(base, data, tmp_path / "c", seed=1), progress=False)
    assert files[0] == files[1]
    assert files[0] != (tmp_path / "c" / tiny.WEIGHTS_NAME).read_bytes()


def test_an_interrupted_run_resumes_to_the_uninterrupted_one(
    base: Path, data: Path, tmp_path: Path
) -> None:
    whole = recipe(base, data, tmp_path / "whole", save_steps=3)
    train(whole, progress=False)

    class StopAfterFour(StopWhenAsked):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.asked = state.global_step == 4
            super().on_step_end(args, state, control, **kwargs)

    half = recipe(base, data, tmp_path / "half")
    summary = train(half, stop=StopAfterFour(), progress=False)
    assert summary.interrupted
    assert summary.steps == 4
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "half")
    assert (tmp_path / "half" / CHECKPOINTS / "checkpoint-4").is_dir()
    rest = train(recipe(base, data, tmp_path / "half", resume=True, save_steps=3), progress=False)
    assert rest.steps == 6
    expected = losses(tmp_path / "whole" / CHECKPOINTS / "checkpoint-6")
    assert losses(tmp_path / "half" / CHECKPOINTS / "checkpoint-6") == pytest.approx(expected)
    for name, tensor in load_file(tmp_path / "whole" / tiny.WEIGHTS_NAME).items():
        torch.testing.assert_close(load_file(tmp_path / "half" / tiny.WEIGHTS_NAME)[name], tensor)


def test_it_stops_early_and_keeps_the_best(base: Path, data: Path, tmp_path: Path) -> None:
    run = recipe(
        base, data, tmp_path, lr=0.5, steps=40, eval_steps=2, patience=2, schedule="linear"
    )
    summary = train(run, progress=False)
    assert summary.steps < 40
    assert not (tmp_path / CHECKPOINTS).exists(), "checkpoints go when the run is done"
    assert summary.final_eval is not None
    measured = scalars(tmp_path, "eval/loss")[1 : 1 + summary.steps // 2]
    assert min(measured) == measured[-3], "two evaluations without an improvement"
    assert summary.final_eval["loss"] == pytest.approx(min(measured), abs=1e-4)


def test_resuming_goes_on_waiting_for_an_improvement(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """A run that is interrupted while early stopping waits ends where it would have ended."""
    # So small a step that no loss changes: the first evaluation is the best.
    options = {"lr": 1e-30, "steps": 40, "eval_steps": 2, "patience": 3}
    whole = train(recipe(base, data, tmp_path / "whole", **options), progress=False)
    assert whole.steps == 8

    class StopBefore(StopWhenAsked):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.asked = state.global_step == whole.steps - 2
            super().on_step_end(args, state, control, **kwargs)

    half = recipe(base, data, tmp_path / "half", **options)
    assert train(half, stop=StopBefore(), progress=False).interrupted
    with pytest.raises(RecipeError, match="holds an adapter; --overwrite"):
        train(half, progress=False)
    rest = train(recipe(base, data, tmp_path / "half", resume=True, **options), progress=False)
    assert rest.steps == whole.steps
    assert rest.final_eval == whole.final_eval


def test_ctrl_c_leaves_a_usable_adapter_and_a_checkpoint(
    base: Path, data: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-W", "ignore", "-m", "peftcore.train", "--model", str(base), "--data",
        str(data), "--output", str(tmp_path / "out"), "--method", "LORA", "--set", "r=2",
        "--steps", "100000", "--batch-size", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    events = tmp_path / "out" / EVENTS
    try:
        end = time.monotonic() + 90
        while not events.exists() or not any(p.stat().st_size > 2000 for p in events.iterdir()):
            assert time.monotonic() < end, "training never started"
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert json.loads(output)["interrupted"] is True
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    assert any((tmp_path / "out" / CHECKPOINTS).iterdir())


def test_a_classifier(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny.bert("FEATURE_EXTRACTION").save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    rows = tmp_path / "rows.tsv"
    rows.write_text(
        "".join(f"{c * 6} film\t{'good' if c < 'd' else 'bad'}\n" for c in "abcdef" * 8)
    )
    run = Recipe(
        model=str(folder), data=str(rows), columns=["text", "label"], task="SEQ_CLS", steps=25,
        method={"peft_type": "LORA", "target_modules": ["query", "value"], "lora_dropout": 0.0},
        eval_rows=12, lr=1e-2, output=tmp_path / "out",
    )  # fmt: skip
    summary = train(run, progress=False)
    assert summary.final_eval is not None
    assert summary.initial_eval is not None
    assert summary.final_eval["accuracy"] > max(0.8, summary.initial_eval["accuracy"])
    tensors = load_file(tmp_path / "out" / tiny.WEIGHTS_NAME)
    assert "base_model.model.classifier.weight" in tensors
    assert summary.labels == ["bad", "good"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    rows.write_text("one\tgood\ntwo\tgood\n")
    with pytest.raises(DataError, match="every row has the label 'good'"):
        train(run.model_copy(update={"overwrite": True}), progress=False)


def test_a_decoder_classifies_by_a_rows_last_token(tmp_path: Path) -> None:
    """Whatever the row is padded with: the tokenizer and the config may name no padding."""
    folder = tmp_path / "llama"
    tiny.llama(pad_token_id=None).save_pretrained(folder)
    tokenizer = tiny.hf_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    texts = [("x" * n + end, end == "!") for n in range(1, 9) for end in "!?"]
    rows.write_text("".join(json.dumps({"text": t, "label": int(y)}) + "\n" for t, y in texts * 3))
    run = Recipe(
        model=str(folder), data=str(rows), task="SEQ_CLS", steps=25, batch_size=8, lr=1e-2,
        method={"peft_type": "LORA", "r": 4}, eval_rows=0.25, output=tmp_path / "out",
    )  # fmt: skip
    summary = train(run, progress=False)
    assert summary.num_eval_rows == 12
    alone = {"batch_size": 1, "steps": 1, "output": tmp_path / "alone"}
    assert train(run.model_copy(update=alone), progress=False).initial_eval == summary.initial_eval
    assert summary.final_eval is not None
    assert summary.final_eval["accuracy"] == 1.0
    theirs = peft.PeftModel.from_pretrained(
        LlamaForSequenceClassification.from_pretrained(folder, num_labels=2), tmp_path / "out"
    ).eval()
    for text, label in [("xxx!", 1), ("x?", 0)]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert int(theirs(input_ids=ids).logits.argmax()) == label


def test_the_adapter_is_uploaded(base: Path, data: Path, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        main(
            ["--model", str(base), "--data", str(data), "--output", str(tmp_path / "mine"),
             "--method", "LORA", "--steps", "1", "--upload", server.url, "--name", "fresh"]
        )  # fmt: skip
        answer = server.http.get("/v1/adapters/fresh")
        assert answer.status_code == 200
        assert answer.json()["method"] == "LORA"
        expected = server.expected("say a", [(tmp_path / "mine", 1.0)])
        assert server.complete("fresh", "say a") == expected


# -- refusals ----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code not in (0, None)
    return str(caught.value.code) + capsys.readouterr().err


def test_bad_data_is_refused_before_the_model_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("peftcore.train.run.load_base", never)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n')
    text = refused(
        capsys, "--model", str(base), "--data", str(rows), "--output", str(tmp_path / "out"),
        "--method", "LORA",
    )  # fmt: skip
    assert f"{rows}:2: no column 'completion'" in text
    assert not (tmp_path / "out").exists()


def test_what_the_command_refuses(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / "out")]
    lora = [*common, "--method", "LORA"]
    for argv, message in [
        ([*common, "--method", "BOFT"], "BOFT"),
        (common, "method"),
        ([*lora, "--set", "r"], "OPTION=VALUE is expected"),
        ([*lora, "--set", "rank=4"], "rank: not known for LORA"),
        ([*lora, "--set", "target_modules=[nothing]"], "matches no module"),
        ([*lora, "--steps", "0"], "steps"),
        ([*lora, "--steps", "1", "--epochs", "1"], "exclude each other"),
        ([*lora, "--patience", "2"], "patience needs held-out rows"),
        ([*lora, "--eval-rows", "32"], "leave none"),
        ([*lora, "--eval-rows", "1.5"], "a number of rows, or a share below 1"),
        (
            [*lora, "--eval-rows", "4", "--eval-steps", "4", "--save-steps", "2"],
            "a checkpoint at each evaluation",
        ),
        ([*lora, "--init-text", "x"], "init_text: is for PREFIX_TUNING"),
        ([*lora, "--resume"], "resume: .* holds no checkpoint"),
        ([*lora, "--name", "x"], "name is for upload only"),
        (
            [*common, "--method", "PROMPT_TUNING", "--set", "num_virtual_tokens=3", "--packing"],
            "packing: only for CAUSAL_LM",
        ),
        (["--model", str(tmp_path / "no"), *lora[2:]], "model: "),
        (["nothing.yaml", *lora], "nothing.yaml"),
    ]:
        text = refused(capsys, *argv)
        assert re.search(message, text), (argv, text)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert "holds an adapter; --overwrite replaces it" in refused(capsys, *lora)
    (tmp_path / "out" / "adapter_config.json").unlink()
    (tmp_path / "out" / CHECKPOINTS / "checkpoint-3").mkdir(parents=True)
    assert "holds an unfinished run; --overwrite" in refused(capsys, *lora)
    assert (tmp_path / "out" / CHECKPOINTS / "checkpoint-3").is_dir()


@pytest.mark.parametrize("package", ["datasets", "tensorboard", "matplotlib"])
def test_what_is_not_installed_is_named_first(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "peftcore.train.cli.find_spec", lambda name: None if name == package else found(name)
    )
    text = refused(capsys, "--data", "x", "--output", "y", "--method", "LORA")
    assert f"{package} is not installed: pip install 'polypeft[train]'" in text


def test_an_upload_that_fails_leaves_the_folder(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(
        capsys, "--model", str(base), "--data", str(data), "--output", str(tmp_path / "out"),
        "--method", "LORA", "--steps", "1", "--upload", "http://127.0.0.1:9",
    )  # fmt: skip
    assert "http://127.0.0.1:9/v1/adapters" in text
    assert f"the adapter is in {tmp_path / 'out'}" in text
    assert (tmp_path / "out" / tiny.WEIGHTS_NAME).is_file()


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: rows.jsonl\noutput: out\nepochs: 2\nlr: 1.0e-3\n"
        "method: {peft_type: LORA, r: 4, lora_alpha: 8}\n"
    )
    found = load_recipe(path, {"steps": 7, "method": {"r": 6}})
    assert (found.steps, found.epochs, found.lr) == (7, None, 1e-3)
    assert found.method == {"peft_type": "LORA", "r": 6, "lora_alpha": 8}
    other = load_recipe(path, {"method": {"peft_type": "IA3"}})
    assert other.method == {"peft_type": "IA3"}
    path.write_text("data: x\noutput: y\nmethod: {peft_type: LORA}\nlearning_rate: 1\n")
    with pytest.raises(RecipeError, match=r"learning_rate: .*\nKnown keys: model"):
        load_recipe(path, {})


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Recipe.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "polypeft-train recipe.yaml" in text
