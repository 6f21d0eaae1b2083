"""`modules_to_save` beside every method that acts on modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    config_from_dict,
    get_peft_model,
)
from peftcore.base import BaseModel
from peftcore.parts import ReplacedModule
from peftcore.primitives import ModuleOverride
from peftcore.program import compile_adapter
from peftcore.quant import QuantLinear, quantize_model
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, quiet

IDS = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "labels": IDS}
PREFIX = "base_model.model."
SAVED = ["lm_head", "layers.1.post_attention_layernorm", "layers.2.self_attn.k_proj", "model.norm"]


def configs(saved: list[str]) -> dict[str, peft.PeftConfig]:
    task: Any = {"modules_to_save": saved, "task_type": "CAUSAL_LM"}
    options: Any = task | {"target_modules": ["q_proj", "down_proj"]}
    with quiet():
        return {
            "adalora": peft.AdaLoraConfig(**options, total_step=9),
            "ia3": peft.IA3Config(**options, feedforward_modules=["down_proj"]),
            "loha": peft.LoHaConfig(**options),
            "lokr": peft.LoKrConfig(**options),
            "lora": peft.LoraConfig(**options),
            "norms": peft.LNTuningConfig(**(task | {"modules_to_save": ["lm_head", "k_proj"]})),
            "oft": peft.OFTConfig(**options),
            "vera": peft.VeraConfig(**options),
        }


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def curve(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", configs(SAVED))
def test_beside_every_method_it_is_pefts(method: str, tmp_path: Path) -> None:
    config = configs(SAVED)[method]
    with quiet():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(tiny.llama(), copy.deepcopy(config))
        torch.manual_seed(3)
        ours = get_peft_model(tiny.llama(), tiny.our_config(config))
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        assert curve(ours) == pytest.approx(curve(theirs), abs=1e-4)
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        expected = load_file(tmp_path / "theirs" / tiny.WEIGHTS_NAME)
        assert load_file(tmp_path / "ours" / tiny.WEIGHTS_NAME).keys() == expected.keys()
        assert f"{PREFIX}lm_head.weight" in expected
        in_peft = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()
    in_ours = PeftModel.from_pretrained(tiny.llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(in_peft), logits(ours.eval()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(in_ours), logits(theirs.eval()), atol=1e-5, rtol=1e-5)


def test_a_container_is_saved_with_all_that_is_in_it(tmp_path: Path) -> None:
    """And what is in it is no target."""
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["layers.1.mlp"])
    tiny.save_random_adapter(tiny.llama(), config, tmp_path)
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    oracle = tiny.PeftOracle(tiny.llama(), [(tmp_path, 1.0)])
    expected = oracle.logits(IDS[0].tolist())
    torch.testing.assert_close(logits(ours, IDS[:1])[0], expected, atol=1e-5, rtol=1e-5)
    file = SavedAdapter.read(tmp_path)
    program = compile_adapter(file.parsed(), file.reader(), BaseModel.from_model(tiny.llama()))
    overrides = {p.module for p in program.primitives if isinstance(p, ModuleOverride)}
    assert overrides == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS[:1])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny.gemma3, tiny.gpt2])
def test_of_two_tied_embeddings_one_alone_is_replaced(make: Any, tmp_path: Path) -> None:
    name = "embed_tokens" if make is tiny.gemma3 else "wte"
    for saved in (["lm_head"], [name], ["lm_head", name]):
        config = peft.LoraConfig(modules_to_save=saved)
        folder = tiny.save_random_adapter(make(), config, tmp_path / "-".join(saved))
        ours = PeftModel.from_pretrained(make(), folder)
        expected = tiny.PeftOracle(make(), [(folder, 1.0)]).logits(IDS[0].tolist())
        torch.testing.assert_close(logits(ours, IDS[:1])[0], expected, atol=1e-4, rtol=1e-4)
        merged = ours.merge_and_unload()
        torch.testing.assert_close(logits(merged, IDS[:1])[0], expected, atol=1e-4, rtol=1e-4)
        assert not merged.config.tie_word_embeddings


def test_each_adapter_has_its_own_copy_and_the_base_keeps_its(tmp_path: Path) -> None:
    base = tiny.llama()
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
        tiny.save_random_adapter(base, config, tmp_path / name, seed)
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", "a")
    ours.load_adapter(tmp_path / "b", "b")
    names = ["b", "__base__", "a", "b"]
    ids = IDS[:1].repeat(len(names), 1)
    with torch.no_grad():
        mixed = ours(ids, adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        parts = [] if name == "__base__" else [(tmp_path / name, 1.0)]
        expected = tiny.PeftOracle(base, parts).logits(ids[0].tolist())
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="do not add up"):
        ours.set_adapter(["a", "b"])
    ours.delete_adapter("a")
    assert torch.equal(ours.unload().lm_head.weight, base.lm_head.weight)


def test_loading_consumes_no_values_and_keeps_buffers(tmp_path: Path) -> None:
    """Gemma's embedding scales by a buffer that is in no file."""
    base = BaseModel.from_model(tiny.gemma3())
    with torch.device("meta"):
        part = ReplacedModule(base.modules["model.embed_tokens"])
    assert part.copy.weight.is_meta
    assert part.copy.embed_scale.item() == pytest.approx(8)
    assert not base.modules["model.embed_tokens"].module.weight.is_meta


def test_a_quantized_module_is_trained_dequantized() -> None:
    model = tiny.llama()
    quantize_model(model, "int8")
    assert isinstance(model.lm_head, QuantLinear)
    dequantized = model.lm_head.dequantize()
    before = logits(model)
    ours = get_peft_model(model, LoraConfig(modules_to_save=["lm_head"]))
    (head,) = [p for n, p in ours.named_parameters() if "lm_head" in n and p.requires_grad]
    torch.testing.assert_close(head, dequantized)
    torch.testing.assert_close(logits(ours), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["absent"]}, "modules_to_save: 'absent' matches no module"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            r"target_modules: \['q_proj'\] matches no module",
        ),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny.llama(), config_from_dict({"peft_type": "LORA", **options}))


def test_a_wrong_shape_or_key_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config, tmp_path))
    base = BaseModel.from_model(tiny.llama())
    key = f"{PREFIX}lm_head.weight"
    longer = file.changed({key: torch.zeros(305, 64)})
    with pytest.raises(CheckpointError, match=rf"{key}: shape \[305, 64\]"):
        compile_adapter(longer.parsed(), longer.reader(), base)
    without = file.changed({key: None})
    with pytest.raises(CheckpointError, match=f"{key}: missing"):
        compile_adapter(without.parsed(), without.reader(), base)
    more = file.changed({f"{PREFIX}lm_head.bias": torch.zeros(300)})
    with pytest.raises(CheckpointError, match=r"lm_head\.bias: no module"):
        compile_adapter(more.parsed(), more.reader(), base)
