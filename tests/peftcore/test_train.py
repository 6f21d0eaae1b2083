"""Training against PEFT: the same files, the same outputs, the same loss curves."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME, config_from_json
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peftcore.methods.prefix_tuning import PrefixAdapter
from peftcore.methods.training import LayerAdapter, TrainableAdapter
from peftcore.program import PrefixKV, compile_adapter
from peftcore.train import (
    DataError,
    Example,
    Recipe,
    RecipeError,
    load_examples,
    load_recipe,
    new_adapter,
    save_adapter,
    tokenize,
    train,
)
from peftcore.train.cli import main
from peftcore.train.data import IGNORED, batches_of, collate
from peftcore.train.trainer import SUMMARY_NAME, fit, num_steps

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases and a tokenizer of bytes, on disk."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            initializer_range=0.2,
            max_position_embeddings=256,
        )
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"say {i}", "completion": "abc" * (1 + i % 4)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # biases are zero when new, which would hide what touches them
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model


def with_peft(model: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def from_files(model: PreTrainedModel, path: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, path).eval()


def recipe_for(folder: Path, rows: Path, output: Path, **values: Any) -> Recipe:
    given = {"method": {"peft_type": "LORA"}, "batch_size": 4, **values}
    return Recipe(model=folder, data=rows, output=output, **given)


NAMES = ["q_proj", "down_proj"]
METHODS: dict[str, tuple[Callable[[], Any], Callable[[], peft.PeftConfig]]] = {
    "lora": (
        lambda: LoraConfig(r=4, lora_alpha=16, target_modules=NAMES),
        lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=NAMES),
    ),
    "lora-default-targets": (lambda: LoraConfig(), lambda: peft.LoraConfig()),
    "rslora-patterns": (
        lambda: LoraConfig(
            target_modules=NAMES,
            use_rslora=True,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"down_proj": 32.0},
            init_lora_weights="gaussian",
        ),
        lambda: peft.LoraConfig(
            target_modules=NAMES,
            use_rslora=True,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"down_proj": 32.0},
            init_lora_weights="gaussian",
        ),
    ),
    "lora-bias": (
        lambda: LoraConfig(target_modules=NAMES, lora_bias=True),
        lambda: peft.LoraConfig(target_modules=NAMES, lora_bias=True),
    ),
    "dora": (
        lambda: LoraConfig(target_modules=NAMES, use_dora=True),
        lambda: peft.LoraConfig(target_modules=NAMES, use_dora=True),
    ),
    "ia3": (lambda: IA3Config(), lambda: peft.IA3Config()),
    "prefix": (
        lambda: PrefixTuningConfig(num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    ),
    "prefix-projection": (
        lambda: PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    ),
    "prompt": (
        lambda: PromptTuningConfig(num_virtual_tokens=3),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    ),
    "p-tuning": (
        lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    ),
}


def trained(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> TrainableAdapter:
    """An adapter of a method after a few steps, so that nothing is at its initial value."""
    torch.manual_seed(1)
    config = dataclasses.replace(METHODS[name][0](), task_type="CAUSAL_LM")
    adapter = new_adapter(model, tokenizer, config)
    sequences = [tokenize(e, tokenizer) for e in load_examples(recipe.data)]
    assert len(list(fit(adapter, sequences, recipe))) == recipe.steps
    return adapter.eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_are_pefts(
    name: str,
    dtype: torch.dtype,
    folder: Path,
    rows: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    recipe = recipe_for(folder, rows, tmp_path / "ours", steps=3, lr=0.02)
    adapter = trained(name, load(folder), tokenizer, recipe)
    save_adapter(adapter, tmp_path / "ours", dtype)

    config = METHODS[name][1]()
    config.task_type = "CAUSAL_LM"
    theirs = with_peft(load(folder), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes lora_B.bias for a broken lora_B
        theirs.save_pretrained(tmp_path / "theirs")
    ours_file, theirs_file = (load_file(tmp_path / d / WEIGHTS_NAME) for d in ("ours", "theirs"))
    assert {k: t.shape for k, t in ours_file.items()} == {
        k: t.shape for k, t in theirs_file.items()
    }
    assert {t.dtype for t in ours_file.values()} == {dtype}
    assert {t.dtype for t in theirs_file.values()} == {torch.float32}
    with safe_open(tmp_path / "ours" / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}

    ours_json, theirs_json = (
        json.loads((tmp_path / d / CONFIG_NAME).read_text()) for d in ("ours", "theirs")
    )
    skip = {"peft_version", "auto_mapping", "base_model_name_or_path"}
    for json_config in (ours_json, theirs_json):
        for key in ("target_modules", "feedforward_modules"):
            if isinstance(json_config.get(key), list):
                json_config[key].sort()
    assert {k: v for k, v in ours_json.items() if k not in skip} == {
        k: v for k, v in theirs_json.items() if k in ours_json and k not in skip
    }

    # Half precision rounds the file's values, which PEFT then loads: compare what it loads.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    ids = torch.tensor([tokenizer("hello there")["input_ids"]])
    keep = torch.arange(ids.shape[1])
    loaded = from_files(load(folder), tmp_path / "ours")
    with torch.no_grad():
        expected = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        actual = adapter(ids, torch.ones_like(ids), keep)
        base = load(folder)(input_ids=ids).logits
    expected = expected[:, -ids.shape[1] :]  # PEFT gives the virtual tokens' logits too
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(base.abs().max()))
    assert not torch.allclose(actual, base, atol=1e-2)

    model = load(folder)
    text = (tmp_path / "ours" / CONFIG_NAME).read_text()
    reader = TensorReader.from_file(tmp_path / "ours" / WEIGHTS_NAME)
    program = compile_adapter(config_from_json(text), reader, BaseModel.from_model(model))
    assert program.num_virtual_tokens == getattr(adapter.config, "num_virtual_tokens", 0)


def peft_names(adapter: TrainableAdapter, theirs: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """PEFT's trainable parameters by the keys of its file."""
    found = {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    if set(found) == set(adapter.tensors()):
        return found
    [(_, parameter)] = found.items()  # a prompt's one embedding, under a name of its own
    return {"prompt_embeddings": parameter}


@pytest.mark.parametrize(
    "name", ["lora", "rslora-patterns", "lora-bias", "ia3", "prefix", "prompt"]
)
def test_loss_curve_is_pefts(
    name: str, folder: Path, rows: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = recipe_for(
        folder, rows, tmp_path, steps=10, lr=0.01, warmup_steps=3, schedule="linear"
    )
    adapter = new_adapter(load(folder), tokenizer, METHODS[name][0]())
    config = METHODS[name][1]()
    config.task_type = "CAUSAL_LM"
    theirs = with_peft(load(folder), config)
    initial = {k: t.clone() for k, t in adapter.tensors().items()}
    parameters = peft_names(adapter, theirs)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(initial[key])

    sequences = [tokenize(e, tokenizer) for e in load_examples(rows)]
    ours = list(fit(adapter, sequences, recipe))

    rng = random.Random(recipe.seed)
    batches = [b for _ in range(2) for b in batches_of(sequences, recipe.batch_size, rng)]
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=0.0)
    theirs.train()
    expected = []
    for step, sequence_batch in enumerate(batches[: recipe.steps]):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(step / 3, (10 - step) / 7)
        batch = collate(sequence_batch)
        loss = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(initial[k], t) for k, t in adapter.tensors().items())


def test_base_weights_stay(
    folder: Path, rows: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained("lora", model, tokenizer, recipe_for(folder, rows, tmp_path, steps=3, lr=0.02))
    after = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_dora_gradients_are_pefts(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(2)
    adapter = new_adapter(load(folder), tokenizer, METHODS["dora"][0]())
    assert isinstance(adapter, LayerAdapter)
    theirs = with_peft(load(folder), METHODS["dora"][1]())
    parameters = peft_names(adapter, theirs)
    own = {
        f"base_model.model.{path}.{name}": parameter
        for path, layer in adapter.layers.items()
        for name, parameter in layer.own_parameters().items()
    }
    ids = torch.tensor([tokenizer("hello there")["input_ids"]])
    with torch.no_grad():
        for key, parameter in parameters.items():
            own[key].add_(torch.rand_like(own[key]))  # the magnitudes are then not the row norms
            parameter.copy_(own[key])
    theirs(input_ids=ids).logits.square().mean().backward()
    adapter(ids, torch.ones_like(ids), torch.arange(ids.shape[1])).square().mean().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(own[key].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_prefix_from_text_is_the_text(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A prefix made of a text's keys and values acts as that text before the prompt."""
    config = PrefixTuningConfig(num_virtual_tokens=6)
    adapter = new_adapter(load(folder), tokenizer, config)
    assert isinstance(adapter, PrefixAdapter)
    text, prompt = (tokenizer(t)["input_ids"] for t in ("before", "the prompt"))
    adapter.start_from_text(text)
    with torch.no_grad():
        expected = load(folder)(torch.tensor([text + prompt])).logits[:, len(text) :]
        ids = torch.tensor([prompt])
        actual = adapter(ids, torch.ones_like(ids), torch.arange(len(prompt)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_prompt_from_text_is_pefts(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {
        "num_virtual_tokens": 5,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "abc",
        "task_type": "CAUSAL_LM",
    }
    adapter = new_adapter(load(folder), tokenizer, PromptTuningConfig(**options))
    config = peft.PromptTuningConfig(**options, tokenizer_name_or_path=str(folder))
    theirs = with_peft(load(folder), config)
    expected = theirs.get_prompt_embedding_to_save("default")
    assert torch.equal(adapter.tensors()["prompt_embeddings"], expected)
    save_adapter(adapter, tmp_path)
    loaded = from_files(load(folder), tmp_path)
    assert torch.equal(loaded.get_prompt_embedding_to_save("default"), expected)


def test_only_the_answer_is_in_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    long, short = (
        tokenize(Example(prompt, completion, 1), tokenizer)
        for prompt, completion in [("question", "an answer"), ("q", "a")]
    )
    batch = collate([long, short])
    for i, completion in enumerate(["an answer", "a"]):
        labels = batch.labels[i]
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{completion}<|end|>"
        assert torch.equal(labels[labels != IGNORED], batch.input_ids[i][labels != IGNORED])
    assert batch.attention_mask.sum(dim=1).tolist() == [len(long.ids), len(short.ids)]
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question"}], add_generation_prompt=True, return_dict=False
    )
    assert list(long.ids[: long.prompt_len]) == served


@pytest.mark.parametrize(
    ("text", "suffix", "line", "reason"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": 1\n', "jsonl", 3, "not valid JSON"),
        ('{"prompt": "a", "completion": "b"}\n["a"]\n', "jsonl", 2, "a JSON object is expected"),
        ('{"prompt": "a", "answer": "b"}\n', "jsonl", 1, "no column 'completion'"),
        ('{"prompt": "a", "completion": null}\n', "jsonl", 1, "holds null"),
        ('{"prompt": "a", "completion": " "}\n', "jsonl", 1, "the completion is empty"),
        ('prompt,completion\na,b\n"c\nd",e\nf\n', "csv", 5, "1 fields, where the header names 2"),
        ("prompt\tcompletion\na\tb\tc\n", "tsv", 2, "3 fields, where the header names 2"),
        ('prompt,completion\na,"b\n', "csv", 2, "not readable as a table"),
        ("prompt,completion\n", "csv", 1, "the file holds no row"),
        ("a b", "txt", 1, "is not one of .jsonl, .csv, .tsv"),
    ],
)
def test_bad_rows_are_refused(
    text: str, suffix: str, line: int, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text)
    with pytest.raises(DataError, match=f"rows.{suffix}:{line}: ") as error:
        load_examples(path)
    assert reason in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        load_examples(path)


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 30)
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert len(error.value.problems) == 30
    assert "rows.jsonl:10: " in str(error.value)
    assert "and 20 more" in str(error.value)


def test_templates_fill_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('title,n,text\n"One, two",7,"a\nb"\nx\u2028y,8,c\n')
    assert load_examples(path, "Say {title} ({n}) {not one}", "{text}") == [
        Example("Say One, two (7) {not one}", "a\nb", 2),
        Example("Say x\u2028y (8) {not one}", "c", 4),
    ]


def test_long_rows_are_refused_before_training(folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:4: \d+ tokens, over max_len of 20"):
        train(recipe_for(folder, rows, tmp_path / "out", max_len=20), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_recipe_makes_an_adapter(
    folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: some/Name\nmethod: {peft_type: LORA, r: 2, target_modules: [q_proj]}\n"
        "steps: 30\nlr: 0.05\nbatch_size: 4\neval_rows: 4\nsave_dtype: float16\n"
    )
    output = tmp_path / "out"
    flags = [str(recipe), f"--model={folder}", f"--data={rows}", f"--output={output}"]
    main([*flags, "--set", "r=3", "--epochs", "5"])
    summary = json.loads((output / SUMMARY_NAME).read_text())
    assert json.loads(capsys.readouterr().out) == summary
    assert (summary["steps"], summary["num_rows"], summary["num_eval_rows"]) == (25, 20, 4)
    assert summary["eval_loss"] < summary["initial_eval_loss"]
    assert summary["interrupted"] is False
    config = json.loads((output / CONFIG_NAME).read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, "some/Name")
    assert {t.dtype for t in load_file(output / WEIGHTS_NAME).values()} == {torch.float16}

    with pytest.raises(SystemExit, match="--overwrite"):
        main(flags)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 1}, "learning_rate: Extra inputs are not permitted"),
        ({"lr": -1}, "lr: Input should be greater than 0"),
        ({"epochs": 1, "steps": 1}, "epochs and steps exclude each other"),
        ({"method": {"peft_type": "BOFT"}}, "BOFT is not served"),
        ({"method": {"peft_type": "LORA", "rank": 4}}, "rank"),
    ],
)
def test_wrong_recipes_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    values = {"model": "m", "data": "d", "output": "o", "method": {"peft_type": "LORA"}}
    recipe.write_text(json.dumps({**values, **changes}))
    with pytest.raises(RecipeError, match=reason):
        load_recipe(recipe, {})


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data: Field required[\s\S]*Known keys: model, "):
        load_recipe(None, {"model": "m", "output": "o", "method": {"peft_type": "LORA"}})


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (LoraConfig(bias="all"), "bias"),
        (LoraConfig(init_lora_weights="eva"), "init_lora_weights"),
        (LoraConfig(use_dora=True, lora_dropout=0.1), "lora_dropout"),
        (LoraConfig(target_modules=["lm_head"]), "target_modules"),
        (
            PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="LSTM"),
            "encoder_reparameterization_type",
        ),
    ],
)
def test_what_is_not_trainable_is_refused_by_name(
    config: Any, field: str, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UnsupportedError) as error:
        new_adapter(load(folder), tokenizer, config)
    assert error.value.field == field


def test_init_text_is_for_prefixes(folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_text"):
        train(recipe_for(folder, rows, tmp_path / "out", init_text="hi"), progress=False)


def test_epochs_and_steps(folder: Path, rows: Path, tmp_path: Path) -> None:
    recipes = [
        recipe_for(folder, rows, tmp_path, **values)
        for values in ({}, {"epochs": 2.5}, {"steps": 7})
    ]
    assert [num_steps(10, recipe) for recipe in recipes] == [3, 8, 7]


def test_interrupt_leaves_a_usable_adapter(folder: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "peftcore.train", f"--model={folder}", f"--data={rows}"]
    command += [f"--output={output}", "--method=LORA", "--steps=1000000"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=root
    ) as process:
        assert process.stderr is not None
        seen = b""
        while b"loss=" not in seen:
            chunk = os.read(process.stderr.fileno(), 4096)
            assert chunk, f"ended before its first step: {seen!r}"
            seen += chunk
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads((output / SUMMARY_NAME).read_text())
    assert summary["interrupted"] is True
    assert summary["steps"] > 0
    from_files(load(folder), output)


def test_a_prefix_compiles_to_what_peft_would_cache(
    folder: Path, rows: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(folder)
    adapter = new_adapter(model, tokenizer, PrefixTuningConfig(num_virtual_tokens=3))
    save_adapter(adapter, tmp_path)
    reader = TensorReader.from_file(tmp_path / WEIGHTS_NAME)
    text = (tmp_path / CONFIG_NAME).read_text()
    program = compile_adapter(config_from_json(text), reader, BaseModel.from_model(model))
    layers = from_files(load(folder), tmp_path).get_prompt(1).layers
    for primitive, layer in zip(program.primitives, layers, strict=True):
        assert isinstance(primitive, PrefixKV)
        assert torch.equal(primitive.keys, layer.keys[0].transpose(0, 1))
        assert torch.equal(primitive.values, layer.values[0].transpose(0, 1))
