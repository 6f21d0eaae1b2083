"""`AutoPeftModelFor…`: what HF peft's loads, and what is refused."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftcore
from peftcore import AutoPeftModel, ConfigError, LoraConfig, get_peft_model
from peftcore.checkpoint import peft_format
from tests import tiny
from tests.peftcore.worlds import quiet

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(5))

#: Class → task, base, options of the base.
CLASSES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "AutoPeftModelForCausalLM": ("CAUSAL_LM", tiny.llama, {}),
    "AutoPeftModelForSequenceClassification": ("SEQ_CLS", tiny.bert, {"num_labels": 3}),
    "AutoPeftModelForTokenClassification": (
        "TOKEN_CLS", lambda: tiny.bert("TOKEN_CLS"), {"num_labels": 3},
    ),
    "AutoPeftModelForFeatureExtraction": (
        "FEATURE_EXTRACTION", lambda: tiny.bert("FEATURE_EXTRACTION"), {},
    ),
}  # fmt: skip


def saved(task: str | None, make: Any, tmp_path: Path, tokenizer: bool = True) -> Path:
    """The folder of a random adapter by peft, which names the folder of its base."""
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj"] if hasattr(base, "model") else ["query", "value"]
    config = peft.LoraConfig(r=3, target_modules=targets, task_type=task)
    folder = tiny.save_random_adapter(base, config, tmp_path / "adapter")
    if tokenizer:  # without one peft asks the hub for it
        tiny.hf_tokenizer().save_pretrained(folder)
    return folder


@torch.inference_mode()
def output(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS)[0]
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_it_loads_what_peft_loads(name: str, tmp_path: Path) -> None:
    task, make, options = CLASSES[name]
    folder = saved(task, make, tmp_path)
    with quiet():
        theirs = getattr(peft, name).from_pretrained(folder, **options)
    ours = getattr(peftcore, name).from_pretrained(folder, **options)
    assert type(ours).__name__ == type(theirs).__name__
    torch.testing.assert_close(output(ours), output(theirs), atol=1e-5, rtol=1e-5)
    either = AutoPeftModel.from_pretrained(str(folder), "mine", is_trainable=True, **options)
    assert either.active_adapter == "mine"
    assert ours.get_nb_trainable_parameters()[0] == 0 < either.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(output(either), output(theirs), atol=1e-5, rtol=1e-5)


def test_new_tokens_make_room(tmp_path: Path) -> None:
    """As PEFT: the base grows where the tokenizer beside the adapter has more tokens."""
    folder = saved("CAUSAL_LM", tiny.llama, tmp_path, tokenizer=False)
    tokenizer = tiny.hf_tokenizer()
    tokenizer.add_tokens([f"<new-{i}>" for i in range(tiny.VOCAB)])
    tokenizer.save_pretrained(folder)
    model = peftcore.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    embedding: Any = model.get_base_model().get_input_embeddings()
    assert embedding.weight.shape[0] == len(tokenizer) > tiny.VOCAB
    assert embedding.weight.dtype == torch.bfloat16


def test_a_config_without_a_task_names_the_bases_class(tmp_path: Path) -> None:
    """PEFT's AutoPeftModel goes by it."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = type(tiny.llama()).from_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    mapping = json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    with quiet():
        theirs = peft.AutoPeftModel.from_pretrained(folder)
    ours = peftcore.AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(output(ours), output(theirs), atol=1e-5, rtol=1e-5)


def test_an_adapter_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its revision is asked for, and no file but an adapter's and a tokenizer's."""
    folder = saved("CAUSAL_LM", tiny.llama, tmp_path)
    for name in ("adapter_model.bin", "optimizer.pt", "model.safetensors"):
        (folder / name).write_bytes(b"x")
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        there = [p.name for p in folder.iterdir()]
        taken = {n for n in there if any(fnmatch(n, pattern) for pattern in allow_patterns)}
        assert taken == {
            "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "tokenizer_config.json",
        }  # fmt: skip
        return str(folder)

    monkeypatch.setattr(peft_format, "snapshot_download", download)
    model = peftcore.AutoPeftModelForCausalLM.from_pretrained("me/mine", revision="v2")
    expected = peftcore.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(output(model), output(expected))
    assert asked == [("me/mine", "v2")]


def test_what_is_refused(tmp_path: Path) -> None:
    folder = saved("CAUSAL_LM", tiny.llama, tmp_path)
    with pytest.raises(ConfigError, match="'CAUSAL_LM': AutoPeftModelForTokenClassification loads"):
        peftcore.AutoPeftModelForTokenClassification.from_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for changes, message in [
        ({"task_type": None}, "None: AutoPeftModel loads one of CAUSAL_LM"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: names no base"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=message):
            AutoPeftModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AutoPeftModel.from_pretrained(tmp_path / "nothing")
