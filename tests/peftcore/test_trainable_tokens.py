"""Trained rows of embeddings, by their own method and beside LoRA; and LoRA on embeddings.

What they share with the other methods is in test_round_trip.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from peftcore import (
    CheckpointError,
    ConfigError,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    get_peft_model,
    get_peft_model_state_dict,
)
from peftcore.base import BaseModel
from peftcore.primitives import RowOverride
from peftcore.program import compile_adapter, digest_of
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, quiet

IDS = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
TOKENS = [int(t) for t in IDS[0].unique()]
SOME = [TOKENS[3], TOKENS[0], 299]
PREFIX = "base_model.model."


def tokens(**options: Any) -> dict[str, Any]:
    return {"peft_type": "TRAINABLE_TOKENS", "token_indices": SOME} | options


def lora(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4} | options


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def both(
    make: Callable[[], PreTrainedModel], config: peft.PeftConfig, seed: int = 3
) -> tuple[peft.PeftModel, PeftModel]:
    """The same new adapter in peft and here."""
    with quiet():
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(make(), copy.deepcopy(config))
    torch.manual_seed(seed)
    return theirs, get_peft_model(make(), tiny.our_config(config))


def curve(model: Any, batch: dict[str, Tensor], steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- whose rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3])
def test_rows_are_absolute_and_a_tied_head_has_them_too(make: Callable, tmp_path: Path) -> None:
    """Against a base whose weights are changed by hand, no adapter on it."""
    config = peft.TrainableTokensConfig(token_indices=SOME)
    tiny.save_random_adapter(make(), config, tmp_path)
    ours = PeftModel.from_pretrained(make(), tmp_path)
    rows = next(v for k, v in load_file(tmp_path / tiny.WEIGHTS_NAME).items() if "lm_head" not in k)
    changed = make()
    with torch.no_grad():
        changed.get_input_embeddings().weight[SOME] = rows
    torch.testing.assert_close(logits(ours), logits(changed), atol=1e-4, rtol=1e-4)
    merged = ours.merge_and_unload()
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == (make is not tiny.llama)
    assert torch.equal(merged.get_input_embeddings().weight, changed.get_input_embeddings().weight)


def test_a_quantized_tied_head_has_the_rows_too(tmp_path: Path) -> None:
    """Its weight is no longer the embedding's own; the model's config says that they are tied."""
    tiny.save_random_adapter(
        tiny.gemma3(), peft.TrainableTokensConfig(token_indices=SOME), tmp_path
    )
    model = tiny.gemma3()
    quantize_model(model, "int8")
    file = SavedAdapter.read(tmp_path)
    program = compile_adapter(file.parsed(), file.reader(), BaseModel.from_model(model))
    assert [(type(p), p.module) for p in program.primitives] == [
        (RowOverride, "model.embed_tokens"),
        (RowOverride, "lm_head"),
    ]
    assert torch.equal(program.primitives[0].rows, program.primitives[1].rows)


def test_what_is_tied_stays_so_in_a_copy_and_is_counted_once() -> None:
    model = get_peft_model(tiny.gpt2(), config_from_dict(tokens()))
    twin = copy.deepcopy(model)
    (trained,) = [p for p in twin.parameters() if p.requires_grad]
    before = logits(model)
    with torch.no_grad():
        trained.add_(1)
    assert torch.equal(logits(model), before)
    copied = twin.get_base_model()
    for module in (copied.transformer.wte, copied.lm_head):
        (override,) = module.parts["default"].primitives()
        assert override.rows is trained


def test_adapters_of_one_batch_have_their_own_rows(tmp_path: Path) -> None:
    model = tiny.gemma3()
    for seed, (name, config) in enumerate(
        {
            "a": peft.TrainableTokensConfig(token_indices=TOKENS[:4]),
            "b": peft.TrainableTokensConfig(token_indices=TOKENS[2:9]),
            "c": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS),
            "d": peft.LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        }.items()
    ):
        tiny.save_random_adapter(model, config, tmp_path / name, seed)
    ours = PeftModel.from_pretrained(model, tmp_path / "a", "a")
    for name in "bcd":
        ours.load_adapter(tmp_path / name, name)
    names = ["b", "a", "__base__", "c", "d", "a"]
    ids = IDS[:1].repeat(len(names), 1)
    with torch.no_grad():
        mixed = ours(ids, adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        if name == "__base__":
            with ours.disable_adapter():
                alone = logits(ours, ids[:1])[0]
        else:
            ours.set_adapter(name)
            alone = logits(ours, ids[:1])[0]
            oracle = tiny.PeftOracle(tiny.gemma3(), [(tmp_path / name, 1.0)])
            expected = oracle.logits(ids[0].tolist())
            torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="do not add up"):
        ours.set_adapter(["a", "b"])


@pytest.mark.parametrize("name", ["tokens", "tokens-lora", "lora-embedding"])
def test_the_padding_token_gets_no_gradient_from_its_embedding(name: str) -> None:
    """As in PEFT, where the module itself keeps it from there."""
    pad = tiny.llama().config.pad_token_id
    assert tiny.llama().get_input_embeddings().padding_idx == pad
    config = {
        "tokens": peft.TrainableTokensConfig(token_indices=[*TOKENS[:3], pad]),
        "tokens-lora": peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices=[pad, *TOKENS[:3]]
        ),
        "lora-embedding": peft.LoraConfig(target_modules=["embed_tokens"]),
    }[name]
    ids = IDS.clone()
    ids[:, 3] = pad
    batch = {"input_ids": ids, "labels": ids}
    theirs, ours = both(tiny.llama, config)
    assert curve(ours, batch) == pytest.approx(curve(theirs, batch), abs=1e-5)
    with quiet():
        expected = peft.get_peft_model_state_dict(theirs)
    for key, tensor in get_peft_model_state_dict(ours).items():
        torch.testing.assert_close(tensor, expected[key])


def test_a_classifiers_head_is_not_trained_beside_them() -> None:
    """PEFT's method has no modules_to_save, and is alone in that."""
    config = peft.TrainableTokensConfig(token_indices=SOME, task_type="SEQ_CLS")
    theirs, ours = both(tiny.bert, config)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert "modules_to_save" not in ours.peft_config["default"].to_dict()
    with pytest.raises(ConfigError, match=r"modules_to_save: .*trainable_token_indices"):
        config_from_dict(tokens(modules_to_save=["classifier"]))


# -- LoRA's option -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices",
    [
        SOME,
        {"embed_tokens": SOME},
        {"lm_head": SOME},
        {"lm_head": SOME, "embed_tokens": SOME},
        {"lm_head": SOME[:2], "model.embed_tokens": SOME},
    ],
)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma3])
def test_every_form_of_the_option_trains_what_peft_trains(
    make: Callable, indices: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM"
    )
    theirs, ours = both(make, config)
    batch = {"input_ids": IDS, "labels": IDS}
    assert curve(ours, batch) == pytest.approx(curve(theirs, batch), abs=1e-4)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    with quiet():
        expected = peft.get_peft_model_state_dict(theirs)
        assert get_peft_model_state_dict(ours).keys() == expected.keys()
        ours.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(again.eval()), logits(ours.eval()), atol=1e-4, rtol=1e-4)


# -- the embeddings' own weights in a file ---------------------------------------------------------


SAVINGS: dict[str, tuple[peft.PeftConfig, Any]] = {
    "target": (peft.LoraConfig(target_modules=["embed_tokens"]), "auto"),
    "targets": (peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"]), "auto"),
    "pattern": (peft.LoraConfig(target_modules=".*(lm_head|q_proj)"), "auto"),
    "path": (peft.LoraConfig(target_modules=["model.embed_tokens"]), "auto"),
    "all-linear": (peft.LoraConfig(target_modules="all-linear"), "auto"),
    "rows": (
        peft.LoraConfig(target_modules=["lm_head"], trainable_token_indices={"embed_tokens": SOME}),
        "auto",
    ),
    "tokens": (peft.TrainableTokensConfig(token_indices=SOME), "auto"),
    "not": (peft.LoraConfig(target_modules=["embed_tokens"]), False),
    "asked": (peft.LoraConfig(target_modules=["q_proj"]), True),
    "asked, rows": (
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=SOME),
        True,
    ),
    "asked, target": (peft.LoraConfig(target_modules=["lm_head"]), True),
    "oft": (peft.OFTConfig(target_modules=["lm_head"]), "auto"),
    "saved": (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "auto"),
}


@pytest.mark.parametrize("name", SAVINGS)
def test_embeddings_are_saved_where_peft_saves_them(name: str, tmp_path: Path) -> None:
    config, option = SAVINGS[name]
    theirs, ours = both(tiny.llama, config)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=option)
        expected = load_file(tmp_path / "theirs" / tiny.WEIGHTS_NAME)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=option)
    got = load_file(tmp_path / "ours" / tiny.WEIGHTS_NAME)
    assert got.keys() == expected.keys()
    for key in got:
        if "base_layer" in key or key.endswith(("lm_head.weight", "embed_tokens.weight")):
            assert torch.equal(got[key], expected[key])
    for folder in ("theirs", "ours"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / folder)


def test_embeddings_beside_a_saved_head_are_taken(tmp_path: Path) -> None:
    """PEFT then writes the head three times."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs, _ = both(tiny.llama, config)
    with quiet():
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.original_module.weight" in load_file(tmp_path / tiny.WEIGHTS_NAME)
    PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model.embed_tokens.weight", lambda w: w + 1, "differs from the base model's weights"),
        ("lm_head.weight", lambda w: torch.cat([w, w[:5]]), r"shape \[305, 64\]"),
    ],
)
def test_an_embedding_that_is_not_the_bases_is_refused(
    key: str, change: Callable, message: str, tmp_path: Path
) -> None:
    """A vocabulary resized for training, or another base."""
    ours = get_peft_model(tiny.llama(), config_from_dict(lora()))
    ours.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / tiny.WEIGHTS_NAME)
    tensors[PREFIX + key] = change(tensors[PREFIX + key])
    save_file(tensors, tmp_path / tiny.WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=f"{PREFIX}{key}: {message}"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


# -- files that do not fit ------------------------------------------------------------------------


def test_the_order_of_ids_is_part_of_the_identity(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=SOME)
    file = SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config, tmp_path / "a"))
    turned = file.changed(token_indices=SOME[::-1])
    assert digest_of(file.parsed(), file.reader()) != digest_of(turned.parsed(), turned.reader())
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=SOME)
    file = SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config, tmp_path / "b"))
    turned = file.changed(trainable_token_indices=SOME[::-1])
    assert digest_of(file.parsed(), file.reader()) != digest_of(turned.parsed(), turned.reader())


def test_a_tied_heads_second_copy_must_be_the_same(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=SOME)
    file = SavedAdapter.read(tiny.save_random_adapter(tiny.gpt2(), config, tmp_path))
    base = BaseModel.from_model(tiny.gpt2())
    key = f"{PREFIX}lm_head.trainable_tokens_delta"
    other = file.changed({key: file.tensors[key] + 1})
    with pytest.raises(CheckpointError, match=f"{key}: differs from the input embedding's rows"):
        compile_adapter(other.parsed(), other.reader(), base)
    without = file.changed({key: None})
    assert len(compile_adapter(without.parsed(), without.reader(), base).primitives) == 2


@pytest.mark.parametrize("method", ["own", "lora"])
def test_a_wrong_shape_or_key_is_named(method: str, tmp_path: Path) -> None:
    config: peft.PeftConfig = peft.TrainableTokensConfig(token_indices=SOME)
    key = f"{PREFIX}model.embed_tokens.trainable_tokens_delta"
    if method == "lora":
        config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=SOME)
        key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    file = SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config, tmp_path))
    base = BaseModel.from_model(tiny.llama())
    fewer = file.changed({key: file.tensors[key][:2]})
    with pytest.raises(CheckpointError, match=rf"{key}: shape \[2, 64\]"):
        compile_adapter(fewer.parsed(), fewer.reader(), base)
    without = file.changed({key: None, f"{PREFIX}model.x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"{key}: missing"):
        compile_adapter(without.parsed(), without.reader(), base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tokens(token_indices=[]), "token_indices: no token is named for model.embed_tokens"),
        (tokens(token_indices=[3, 3]), "token_indices: a token is named twice"),
        (tokens(token_indices=[-1]), "token_indices: -1: model.embed_tokens has the rows"),
        (tokens(token_indices=[300]), "token_indices: 300: model.embed_tokens has the rows 0 to"),
        (tokens(target_modules=["q_proj"]), "q_proj: neither an embedding nor linear without bias"),
        (tokens(target_modules=["norm"]), "model.norm is not a linear layer"),
        (tokens(target_modules=["absent"]), "matches no module"),
        (lora(trainable_token_indices=[]), "trainable_token_indices: no token is named"),
        (lora(trainable_token_indices=[300]), "trainable_token_indices: 300"),
        (lora(trainable_token_indices={"x": [1]}), "trainable_token_indices: 'x' matches no"),
        (
            lora(trainable_token_indices={"embed_tokens": [1], "model.embed_tokens": [2]}),
            "trainable_token_indices: model.embed_tokens is named twice",
        ),
        (
            lora(trainable_token_indices=[1], target_modules=["embed_tokens"]),
            "target_modules: model.embed_tokens is also trained whole, or its tokens are",
        ),
        (
            lora(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
            "target_modules: model.embed_tokens is also trained whole, or its tokens are",
        ),
        (lora(target_modules=["embed_tokens"], use_dora=True), "use_dora: is not supported"),
        (lora(target_modules=["embed_tokens"], lora_bias=True), "lora_bias: is not supported"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        get_peft_model(tiny.llama(), config_from_dict(config))


def test_a_tied_head_cannot_be_a_target_beside_its_tokens() -> None:
    """PEFT adds the update to the new rows, and an adapter's rows are final here."""
    config = lora(target_modules=["lm_head"], trainable_token_indices=[1])
    with pytest.raises(ConfigError, match="target_modules: lm_head is also trained"):
        get_peft_model(tiny.gemma3(), config_from_dict(config))
    get_peft_model(tiny.llama(), config_from_dict(config))


def test_a_saved_config_is_read_by_peft(tmp_path: Path) -> None:
    for name, config in {"a": tokens(), "b": lora(trainable_token_indices={"wte": SOME})}.items():
        if name == "b":
            config["target_modules"] = ["c_attn"]
        get_peft_model(tiny.gpt2(), config_from_dict(config)).save_pretrained(tmp_path / name)
        with quiet():
            peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path / name)
        written = json.loads((tmp_path / name / tiny.CONFIG_NAME).read_text())
        assert written["peft_type"] == config["peft_type"]
