"""What a model's own files say of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.sequence import PoolingParams
from server.models.embedding import default_embedding, embedding_defaults
from server.models.loader import LoadedModel, load_model, prepare_model
from server.models.probe import UnservableModel
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> LoadedModel:
    return prepare_model(tiny.bert("FEATURE_EXTRACTION"), "none", CPU)


def write(folder: Path, modules: list[str], **pooling: Any) -> None:
    listed = [
        {"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"}
        for i, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for module in listed:
        if module["type"].endswith("Pooling"):
            (folder / module["path"]).mkdir()
            (folder / module["path"] / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (["Transformer", "Pooling", "Normalize"], "mean_tokens", PoolingParams("mean", True)),
        (["Transformer", "Pooling"], "cls_token", PoolingParams("cls", False)),
        (["Transformer", "Pooling", "Normalize"], "lasttoken", PoolingParams("last", True)),
        (["Transformer", "Pooling"], "max_tokens", PoolingParams("mean", False)),
    ],
)
def test_sentence_transformers_files(
    encoder: LoadedModel, tmp_path: Path, modules: list[str], pooling: str, expected: PoolingParams
) -> None:
    modes = {f"pooling_mode_{m}": False for m in ("mean_tokens", "cls_token", "max_tokens")}
    write(tmp_path, modules, **(modes | {f"pooling_mode_{pooling}": True}))
    assert embedding_defaults(tmp_path, encoder) == expected


def test_without_such_files(encoder: LoadedModel, tmp_path: Path) -> None:
    assert embedding_defaults(tmp_path, encoder) == PoolingParams("mean", True)
    (tmp_path / "modules.json").write_text("no JSON")
    assert embedding_defaults(tmp_path, encoder) == PoolingParams("mean", True)
    decoder = prepare_model(tiny.llama(), "none", CPU)
    assert default_embedding(decoder) == PoolingParams("last", True)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_an_encoders_folder_is_loaded_whatever_head_it_was_saved_with(
    task: str, tmp_path: Path
) -> None:
    model = tiny.bert(task)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "none", CPU)
    assert loaded.is_encoder
    weights = loaded.base.modules["embeddings.word_embeddings"].weight()
    assert torch.equal(weights, model.get_input_embeddings().weight)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    """A pooler may be missing: not every head reads it."""
    from safetensors.torch import load_file, save_file

    tiny.bert("FEATURE_EXTRACTION").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {k: t for k, t in load_file(file).items() if "layer.1.output" not in k}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UnservableModel, match=r"holds no weights of .*layer\.1\.output\.dense"):
        load_model(tmp_path, "none", CPU)
