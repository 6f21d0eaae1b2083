"""AdapterHub's classifiers: their heads are uploaded beside them. What is asked of classes."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, TokenClassificationPipeline

from clients.client import Client
from clients.errors import InvalidInput
from server.build import adapter_folders, preload
from tests import tiny
from tests.peftcore import make_adapterhub_fixtures as original
from tests.peftcore.hub import headed, hub
from tests.serving import Served, serve


@dataclass
class World:
    """A server of an encoder for which the fixtures' adapters are."""

    served: Served
    model: str

    def write(self, case: str, **files: bytes | None) -> Path:
        """A case's files in a folder, with others in their place, by their first name."""
        folder = self.served.folder / f"{case}-{len(list(self.served.folder.iterdir()))}"
        folder.mkdir()
        for name, data in headed(case)[0].items():
            changed = files.get(name.partition(".")[0], data)
            if changed is not None:
                (folder / name).write_bytes(changed)
        return folder

    def push(self, case: str, **files: bytes | None) -> Any:
        """The answer of an upload of all four files by an HTTP client."""
        parts = {
            part: (name, files.get(part, headed(case)[0][name]))
            for part, name in [
                ("config", "adapter_config.json"),
                ("weights", "adapter.safetensors"),
                ("head", "model_head.safetensors"),
                ("head_config", "head_config.json"),
            ]
        }
        sent = {part: file for part, file in parts.items() if file[1] is not None}
        return self.served.http.post("/v1/adapters", data={"name": "made"}, files=sent)

    def classify(self, name: str) -> dict[str, Any]:
        ids = original.batch(self.model)["input_ids"][0].tolist()
        answer = self.served.http.post("/v1/classify", json={"model": name, "input": ids})
        assert answer.status_code == 200, answer.text
        (item,) = answer.json()["data"]
        return item


def base_of(model: str) -> PreTrainedModel:
    """The fixtures' encoder, with more positions: fewer are not served."""
    made = hub(model).base().base_model
    config = copy.deepcopy(made.config)
    config.max_position_embeddings = 130
    base = type(made)(config)
    state = made.state_dict()
    key = "embeddings.position_embeddings.weight"
    state[key] = torch.cat([state[key], base.state_dict()[key][len(state[key]) :]])
    base.load_state_dict(state, strict=False)
    return base.eval()


@contextmanager
def world(model: str, folder: Path) -> Iterator[World]:
    with serve(folder, base_of(model)) as served:
        yield World(served, model)
        served.wait_idle()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world("bert", tmp_path_factory.mktemp("heads")) as made:
        yield made


def cases(model: str) -> list[str]:
    return [case for case, (of, _, _) in original.HEADS.items() if of == model]


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_a_pushed_folder_classifies_as_adapterhub_does(model: str, tmp_path: Path) -> None:
    """Its logits, and the labels that its head's config has."""
    with world(model, tmp_path) as made, Client(made.served.url) as client:
        for case in cases(model):
            pushed = client.adapters.push(case, made.write(case))
            assert pushed.method == "BOTTLENECK"
            logits, item = headed(case)[1], made.classify(case)
            own = "LABEL_{}" if case == "transformers" else "class {}"
            if case == "tags":
                scores, classes = logits.softmax(-1).max(-1)
                assert [t["label"] for t in item["tokens"]] == [own.format(c) for c in classes]
                np.testing.assert_allclose([t["score"] for t in item["tokens"]], scores, atol=1e-5)
            elif case == "one-number":
                np.testing.assert_allclose(item["values"], logits, atol=1e-5)
                assert "probs" not in item
            elif case == "multi-label":
                np.testing.assert_allclose(item["probs"], logits.sigmoid(), atol=1e-5)
                assert item["labels"] == [own.format(i) for i in range(3) if logits[i] >= 0]
            else:
                np.testing.assert_allclose(item["probs"], logits.softmax(-1), atol=1e-5)
                assert item["label"] == own.format(int(logits.argmax()))


def test_what_was_stored_is_read_again_as_it_was(bert: World, tmp_path: Path) -> None:
    """After a restart, from the two files alone; and from --preload's folder."""
    folder = tmp_path / "adapters" / "judge"
    folder.parent.mkdir()
    bert.write("two-layers").rename(folder)
    probs = []
    for start in range(2):
        root = tmp_path / f"start-{start}"
        root.mkdir()
        if start > 0:
            (tmp_path / "start-0" / "data").rename(root / "data")
        with serve(root, base_of("bert")) as served:
            if start == 0:
                given = tiny.settings(root, preload=folder.parent)
                preload(served.runtime, adapter_folders(given))
            probs.append(World(served, "bert").classify("judge")["probs"])
            served.wait_idle()
        for kept in root.rglob("packed.safetensors"):
            kept.unlink()  # it is compiled anew
    assert (
        probs[0]
        == probs[1]
        == pytest.approx(headed("two-layers")[1].softmax(-1).tolist(), abs=1e-5)
    )


def test_labels_that_are_sent_win_over_the_heads(bert: World) -> None:
    config = {"model_type": "bert", "id2label": {"0": "x", "1": "y", "2": "z"}}
    folder = bert.write("two-layers")
    (folder / "config.json").write_text(json.dumps(config))
    with Client(bert.served.url) as client:
        client.adapters.push("named", folder)
    assert bert.classify("named")["label"] in ("x", "y", "z")


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"classifier.weight": torch.ones(3, 16)}, buffer)
    return buffer.getvalue()


def changed_head(**changes: Any) -> bytes:
    config = json.loads(headed("two-layers")[0]["head_config.json"])
    return json.dumps(config | {"config": config["config"] | changes}).encode()


@pytest.mark.parametrize(
    ("files", "status", "param", "reason"),
    [
        ({"head": pickled()}, 422, "head", "use_safetensors=True"),
        ({"head": b"x" * 90}, 422, "head", "not a readable safetensors file"),
        ({"head": None}, 400, "head", "head_config: goes beside head"),
        ({"head_config": None}, 422, "head_config.json", "required beside heads.tuned.1"),
        ({"head_config": b"{"}, 422, "head_config.json", "not valid JSON"),
        ({"head_config": b"[]"}, 422, "head_config.json", "a JSON object"),
        ({"head_config": b'{"config": 7}'}, 422, "head_config.json", "an object is expected"),
        (
            {"head_config": changed_head(head_type="question_answering")},
            422,
            "head_config.json",
            "'question_answering' is not one of classification,",
        ),
        (
            {"head_config": changed_head(activation_function="relu")},
            422,
            "head_config.json",
            "layers=2, activation_function='tanh', use_pooler=False",
        ),
        ({"head_config": changed_head(layers=1)}, 422, "head_config.json", "no SEQ_CLS head"),
        (
            {"head_config": changed_head(layers=1, use_pooler=True)},
            422,
            "heads.tuned.4.bias",
            "implies no such tensor",
        ),
        ({"head_config": changed_head(label2id=[1])}, 422, "head_config.json", "label2id"),
        ({"head_config": changed_head(label2id={"a": 0})}, 422, "id2label", "1 labels"),
    ],
)
def test_refused_heads(
    bert: World, files: dict[str, bytes | None], status: int, param: str, reason: str
) -> None:
    answer = bert.push("two-layers", **files)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert reason in error["message"]
    assert bert.served.http.get("/v1/adapters/made").status_code == 404
    bert.served.wait_idle()


def test_a_head_beside_pefts_files_is_refused(bert: World) -> None:
    answer = bert.push("two-layers", config=b'{"peft_type": "LORA", "r": 2}')
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "head"


def test_the_client_refuses_a_pickled_head_before_it_sends_anything(bert: World) -> None:
    folder = bert.write("two-layers", model_head=None)
    (folder / "pytorch_model_head.bin").write_bytes(pickled())
    with (
        Client(bert.served.url) as client,
        pytest.raises(InvalidInput, match="use_safetensors=True"),
    ):
        client.adapters.push("pickled", folder)


# -- what is asked of classes, and entities --------------------------------------------------------


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize(
    "problem_type",
    [None, "single_label_classification", "multi_label_classification", "regression"],
)
def test_the_problem_type_is_as_in_transformers_pipeline(
    bert: World, problem_type: str | None, num_labels: int
) -> None:
    """It comes with the trained model's config.json; the same head answers what it was trained to.
    One label alone is a probability by itself unless it is a regression's."""
    base = base_of("bert")
    config = tiny.peft_configs("bert", "SEQ_CLS")["lora-r4"]
    model = tiny.for_task(base, "SEQ_CLS", num_labels)
    folder = tiny.save_random_adapter(model, config, bert.served.folder / "lora" / str(num_labels))
    said = json.dumps({"model_type": "bert", "problem_type": problem_type}).encode()
    answer = bert.served.push("asked", folder, id2label=said)
    assert answer.status_code == 201, answer.text
    assert answer.json()["problem_type"] == problem_type
    item = bert.classify("asked")
    logits = (
        tiny.PeftOracle(model, [(folder, 1.0)])
        .model(original.batch("bert")["input_ids"][:1])
        .logits[0]
    )
    if problem_type == "regression":
        np.testing.assert_allclose(item["values"], logits.detach(), atol=1e-5)
        assert not item.keys() & {"label", "labels", "probs"}
        return
    several = problem_type == "multi_label_classification"
    one_of_all = num_labels > 1 and not several
    expected = logits.softmax(-1) if one_of_all else logits.sigmoid()
    np.testing.assert_allclose(item["probs"], expected.detach(), atol=1e-5)
    assert ("labels" in item) == several


def test_an_unknown_problem_type_is_refused(bert: World) -> None:
    answer = bert.push("two-layers")
    assert answer.status_code == 201
    files, _ = headed("two-layers")
    parts = {
        "config": ("c", files["adapter_config.json"]),
        "weights": ("w", files["adapter.safetensors"]),
        "id2label": ("l", b'{"problem_type": "ranking"}'),
    }
    answer = bert.served.http.post("/v1/adapters", data={"name": "made"}, files=parts)
    assert answer.status_code == 400
    assert "problem_type is one of single_label" in answer.json()["error"]["message"]
    bert.served.http.delete("/v1/adapters/made")


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    """A server, and transformers' pipeline around peft's model of the same adapter."""
    base = tiny.bert("FEATURE_EXTRACTION")
    model = tiny.for_task(base, "TOKEN_CLS", len(TAGS))
    config = tiny.peft_configs("bert", "TOKEN_CLS")["lora-r4"]
    with serve(tmp_path_factory.mktemp("tags"), base) as served:
        folder = tiny.save_random_adapter(model, config, served.folder / "tags")
        served.push("tags", folder, id2label=json.dumps(TAGS).encode())
        merged = tiny.PeftOracle(model, [(folder, 1.0)]).model.merge_and_unload()
        merged.config.id2label = dict(enumerate(TAGS))
        merged.config.label2id = {tag: i for i, tag in enumerate(TAGS)}
        yield served, TokenClassificationPipeline(model=merged, tokenizer=tiny.hf_tokenizer())


def test_entities_are_those_of_transformers_pipeline(tagger: tuple[Served, Any]) -> None:
    served, pipeline = tagger
    texts = ["Ada met Alan in Paris", "nobody", "ab  ba", "Grüße aus Köln!", "x" * 60]
    found = 0
    for text in texts:
        body = {"model": "tags", "input": text, "aggregation": "simple"}
        answer = served.http.post("/v1/classify", json=body)
        assert answer.status_code == 200, answer.text
        (item,) = answer.json()["data"]
        assert "tokens" not in item
        expected = pipeline(text, aggregation_strategy="simple")
        assert [(e["label"], e["start"], e["end"]) for e in item["entities"]] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        for own, other in zip(item["entities"], expected, strict=True):
            assert own["score"] == pytest.approx(float(other["score"]), abs=1e-4)
            assert own["text"] == text[own["start"] : own["end"]]
        found += sum(e["end"] - e["start"] > 1 for e in item["entities"])
    assert found > 5, "tokens were joined"


def test_refused_aggregations(tagger: tuple[Served, Any], bert: World) -> None:
    served, _ = tagger
    for more, reason in [
        ({"input": [1, 2]}, "send texts"),
        ({"input": "a", "text_pair": "b"}, "without text_pair"),
        ({"input": "a", "aggregation": "max"}, "'none' or 'simple'"),
    ]:
        body = {"model": "tags", "aggregation": "simple"} | more
        answer = served.http.post("/v1/classify", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "aggregation"
        assert reason in answer.json()["error"]["message"]
    bert.push("two-layers")
    body = {"model": "made", "input": "a", "aggregation": "simple"}
    answer = bert.served.http.post("/v1/classify", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "aggregation")
    bert.served.http.delete("/v1/adapters/made")
