"""Perplexity by the server's way to compute, against transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from loadtests import perplexity
from server.models.loader import load_model
from tests import tiny


def texts_file(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


def test_losses_are_transformers(model_folder: Path) -> None:
    """Of texts of several lengths in one pass: what the model's own loss of each adds up to."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in (2, 16, 40, 17)]
    model = tiny.llama()
    with torch.inference_mode():
        expected = sum(
            float(model(torch.tensor([text]), labels=torch.tensor([text])).loss) * (len(text) - 1)
            for text in texts
        )
    loaded = load_model(model_folder, "none", torch.device("cpu"))
    assert perplexity.losses(loaded, texts, torch.float32) == pytest.approx(expected, rel=1e-5)


def test_every_form_is_measured(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = texts_file(
        tmp_path / "data.jsonl", {"question": "One and two?", "answer": "Three."}, {"text": "abc"}
    )
    out = tmp_path / "result.json"
    perplexity.main(["--data", str(data), "--model", str(model_folder), "--json", str(out)])
    found = {
        (form["quantization"], form["activations"], form["kv_cache"]): form
        for form in json.loads(out.read_text())["forms"]
    }
    assert len(found) == len(perplexity.FORMS)
    reference = found["none", "float", "float32"]
    assert reference["loss"] == 0
    for form in found.values():
        assert form["loss"] == pytest.approx(form["perplexity"] / reference["perplexity"] - 1)
        assert math.isfinite(form["perplexity"])
    assert found["int8", "int16", "float32"]["loss_to_float"] != 0
    assert "nf4" in capsys.readouterr().out


def test_an_adapters_factors_are_another_form(model_folder: Path, tmp_path: Path) -> None:
    """Its losses are those of peft; rounded they differ by little."""
    model = tiny.llama()
    config = tiny.peft_configs("llama")["lora-r8-all"]
    folder = tiny.save_random_adapter(model, config, tmp_path / "adapter", scale=0.08)
    data, out = texts_file(tmp_path / "data.jsonl", {"text": "abc, and more"}), tmp_path / "r.json"
    perplexity.main(
        ["--data", str(data), "--model", str(model_folder), "--adapter", str(folder),
         "--json", str(out)]
    )  # fmt: skip
    result = json.loads(out.read_text())
    found = {
        (form["quantization"], form["activations"], form["kv_cache"], form["adapter"]): form
        for form in result["forms"]
    }
    assert len(found) == len(perplexity.FORMS) + len(perplexity.ADAPTER_FORMS)
    ids = tiny.hf_tokenizer()("abc, and more")["input_ids"]
    logits = tiny.PeftOracle(model, [(folder, 1.0)]).logits(ids)[:-1]
    expected = math.exp(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))))
    whole = found["none", "float", "float32", "float"]["perplexity"]
    assert whole == pytest.approx(expected, rel=1e-4)
    rounded = found["none", "float", "float32", "int8"]["perplexity"]
    assert rounded == pytest.approx(whole, rel=0.02)
    assert rounded != whole
    assert result["adapter"] == "adapter"


def test_forms_of_some_weights(model_folder: Path, tmp_path: Path) -> None:
    data, out = texts_file(tmp_path / "data.jsonl", {"text": "abc"}), tmp_path / "result.json"
    flags = ["--data", str(data), "--model", str(model_folder), "--json", str(out)]
    perplexity.main([*flags, "--weights", "nf4"])
    weights = [form["quantization"] for form in json.loads(out.read_text())["forms"]]
    assert weights == ["none", *["nf4"] * 4]


def test_texts_are_put_together_up_to_the_tokens_of_a_pass() -> None:
    texts = [[0] * n for n in (3, 4, 9, 1, 2)]
    assert [[len(t) for t in p] for p in perplexity.passes(texts, 7)] == [[3, 4], [9], [1, 2]]


@pytest.mark.parametrize(
    ("line", "what"), [("{", ":2: "), ("[1]", "2: no object"), ('{"n": 1}', "2: no object")]
)
def test_a_line_without_text_is_refused_by_its_number(tmp_path: Path, line: str, what: str) -> None:
    data = texts_file(tmp_path / "data.jsonl", {"text": "abc"}, line)
    with pytest.raises(ValueError, match=what):
        perplexity.read_texts(data, 10)
    assert perplexity.read_texts(data, 1) == ["abc"]
