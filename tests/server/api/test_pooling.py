"""/v1/embeddings and /v1/classify: of an encoder, and of a decoder beside its chat."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.server.api.conftest import Clients
from tests.server.engine.test_fleet import peft_logits
from tests.serving import CONFIG, Served, serve

LABELS = ["anger", "joy", "calm"]
#: Name → method, task, number of labels.
ADAPTERS = {
    "mood": ("lora-r4", "SEQ_CLS", 3),
    "topic": ("ia3", "SEQ_CLS", 5),
    "spam": ("prefix", "SEQ_CLS", 2),
    "score": ("dora", "SEQ_CLS", 1),
    "names": ("dora", "TOKEN_CLS", 4),
    "finder": ("lora-r4", "FEATURE_EXTRACTION", 1),
}


class World:
    """A server of one base with adapters of several tasks."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.base = served.model
        self.folders: dict[str, Path] = {}
        for seed, (name, (kind, task, num_labels)) in enumerate(ADAPTERS.items()):
            self.folders[name] = self.make(name, kind, task, num_labels, seed)
            labels = json.dumps(LABELS).encode() if name == "mood" else None
            answer = served.push(name, self.folders[name], id2label=labels)
            assert answer.status_code == 201, answer.text

    def make(self, name: str, kind: str, task: str, num_labels: int, seed: int) -> Path:
        config = tiny.peft_configs(self.base.config.model_type, task)[kind]
        model = tiny.for_task(self.base, task, num_labels)
        return tiny.save_random_adapter(model, config, self.served.folder / name, seed)

    def logits(self, name: str, text: str) -> torch.Tensor:
        """peft's."""
        _, task, num_labels = ADAPTERS[name]
        ids = self.served.runtime.tokenizer.encode(text)
        return peft_logits(tiny.for_task(self.base, task, num_labels), self.folders[name], ids)[0]

    def post(self, path: str, **body: Any) -> Any:
        answer = self.served.http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        """Status, field and message."""
        answer = self.served.http.post(f"/v1/{path}", json=body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["message"]


def model_of(name: str) -> PreTrainedModel:
    return tiny.bert("FEATURE_EXTRACTION") if name == "bert" else tiny.llama()


@pytest.fixture(scope="module", params=["bert", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with serve(tmp_path_factory.mktemp("pooling"), model_of(request.param)) as served:
        yield World(served)
        served.wait_idle()


def expected_embedding(world: World, text: str, pooling: str, normalize: bool) -> torch.Tensor:
    ids = world.served.runtime.tokenizer.encode(text)
    model = world.base
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    vector = {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return torch.nn.functional.normalize(vector, dim=0) if normalize else vector


def default_kind(world: World) -> str:
    return "last" if world.served.runtime.generates else "mean"


# -- embeddings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_floats", [True, False])
def test_the_openai_client_gets_embeddings(
    world: World, as_floats: bool, client_of: Clients
) -> None:
    """It asks for base64 by default, and for floats where it is told. Of vectors in base64 its type
    has the floats that it makes of them, so it cannot be strict about these."""
    client = client_of(world.served, _strict_response_validation=as_floats)
    texts = ["one text", "another, longer text"]
    options: list[dict[str, Any]] = [{"encoding_format": "float"}] if as_floats else [{}]
    for option in options:
        answer = client.embeddings.create(model="tiny", input=texts, user="me", **option)
        assert answer.object == "list"
        assert answer.model == "tiny"
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
        for text, item in zip(texts, answer.data, strict=True):
            expected = expected_embedding(world, text, default_kind(world), True)
            np.testing.assert_allclose(item.embedding, expected, atol=1e-5)


def test_every_form_of_input(world: World) -> None:
    ids = world.served.runtime.tokenizer.encode("abc")
    one = world.post("embeddings", model="tiny", input="abc")["data"][0]["embedding"]
    for given, count in [(["abc"], 1), (ids, 1), ([ids, ids], 2), (["abc", "abc"], 2)]:
        data = world.post("embeddings", model="tiny", input=given)["data"]
        assert len(data) == count
        for item in data:
            np.testing.assert_allclose(item["embedding"], one, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_and_normalize(world: World, pooling: str, normalize: bool) -> None:
    body = {"model": "tiny", "input": "some text", "pooling": pooling, "normalize": normalize}
    vector = world.post("embeddings", **body)["data"][0]["embedding"]
    expected = expected_embedding(world, "some text", pooling, normalize)
    np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_an_adapters_embeddings_are_its_own(world: World, client_of: Clients) -> None:
    """Of every task; a mixture's too."""
    client = client_of(world.served, _strict_response_validation=False)
    base = world.post("embeddings", model="tiny", input="abc")["data"][0]["embedding"]
    for name in ADAPTERS:
        own = client.embeddings.create(model=name, input="abc").data[0].embedding
        assert np.abs(np.array(own) - base).max() > 1e-3, name
    alone = world.post("embeddings", model="finder", input="abc")["data"][0]["embedding"]
    mixture = [{"name": "finder", "weight": 1.0}]
    mixed = world.post("embeddings", model="tiny", adapters=mixture, input="abc")
    np.testing.assert_allclose(mixed["data"][0]["embedding"], alone, atol=1e-6)
    half = world.post(
        "embeddings", model="tiny", adapters=[{"name": "finder", "weight": 0.5}], input="abc"
    )
    assert np.abs(np.array(half["data"][0]["embedding"]) - alone).max() > 1e-3


def test_base64_is_the_floats_bytes(world: World) -> None:
    floats = world.post("embeddings", model="tiny", input="abc")["data"][0]["embedding"]
    body = {"model": "tiny", "input": "abc", "encoding_format": "base64"}
    text = world.post("embeddings", **body)["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.float32(floats))


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"input": []}, "input", "expected"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": ["a", [1]]}, "input", "all be"),
        ({"input": [[1, -1]]}, "input", "vocabulary"),
        ({"input": [1, 2, 300]}, "input", "vocabulary"),
        ({"input": "\ud800"}, "input", "surrogate"),
        ({"input": ["x"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "dimensions": 8}, "dimensions", "not supported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "pooling": "max"}, "pooling", "'mean', 'cls' or 'last'"),
        ({"input": "a", "normalize": "yes"}, "normalize", "boolean"),
        ({"input": "a", "nonsense": 1}, "nonsense", "no such field"),
        ({}, "input", "required"),
    ],
)
def test_refused_embeddings(world: World, body: dict[str, Any], param: str, reason: str) -> None:
    text = json.dumps({"model": "tiny"} | body)
    answer = world.served.http.post(
        "/v1/embeddings", content=text, headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == param
    assert reason in error["message"]


def test_an_input_that_is_too_long_is_refused_by_its_number(world: World) -> None:
    longest = world.served.runtime.max_model_len
    world.post("embeddings", model="tiny", input="x" * longest)
    status, param, message = world.refused(
        "embeddings", model="tiny", input=["short", "x" * (longest + 1)]
    )
    assert (status, param) == (400, "input[1]")
    assert f"{longest + 1} tokens" in message
    num_virtual = world.served.http.get("/v1/adapters/spam").json()["num_virtual_tokens"]
    room = longest - num_virtual
    world.post("classify", model="spam", input="x" * room)
    assert world.refused("classify", model="spam", input="x" * (room + 1))[:2] == (400, "input")


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mood", "topic", "spam"])
def test_classify(world: World, name: str) -> None:
    texts = ["what a day", "no", "is that so, or is it not?"]
    answer = world.post("classify", model=name, input=texts)
    assert answer["id"].startswith("classify-")
    assert (answer["object"], answer["model"]) == ("list", name)
    assert (
        answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(map(len, texts))
    )
    num_labels = ADAPTERS[name][2]
    labels = LABELS if name == "mood" else [f"LABEL_{i}" for i in range(num_labels)]
    for i, (text, item) in enumerate(zip(texts, answer["data"], strict=True)):
        expected = world.logits(name, text).softmax(-1)
        np.testing.assert_allclose(item["probs"], expected, atol=1e-4)
        assert item["index"] == i
        assert item["num_classes"] == num_labels
        assert item["label"] == labels[int(expected.argmax())]


def test_one_class_is_a_probability_by_itself(world: World) -> None:
    item = world.post("classify", model="score", input="abc")["data"][0]
    np.testing.assert_allclose(item["probs"], world.logits("score", "abc").sigmoid(), atol=1e-4)


def test_classify_tokens(world: World) -> None:
    text = "Ada met Alan"
    (item,) = world.post("classify", model="names", input=text)["data"]
    probs = world.logits("names", text).softmax(-1)
    assert item["num_classes"] == 4
    assert [token["token"] for token in item["tokens"]] == list(text)
    for i, token in enumerate(item["tokens"]):
        assert (token["start"], token["end"]) == (i, i + 1)
        assert token["label"] == f"LABEL_{int(probs[i].argmax())}"
        assert token["score"] == pytest.approx(float(probs[i].max()), abs=1e-4)
    ids = world.served.runtime.tokenizer.encode(text)
    (same,) = world.post("classify", model="names", input=ids)["data"]
    assert [t["label"] for t in same["tokens"]] == [t["label"] for t in item["tokens"]]
    assert "start" not in same["tokens"][0]


def test_two_texts(world: World) -> None:
    """Joined as the model's tokenizer joins them: the tiny one puts nothing between."""
    pair = world.post("classify", model="mood", input=["ab"], text_pair=["cd"])["data"][0]
    whole = world.post("classify", model="mood", input="abcd")["data"][0]
    np.testing.assert_allclose(pair["probs"], whole["probs"], atol=1e-5)
    assert world.refused("classify", model="mood", input=["a", "b"], text_pair="c")[:2] == (
        400,
        "text_pair",
    )
    assert world.refused("classify", model="mood", input=[1, 2], text_pair="c")[1] == "text_pair"


def test_requests_are_counted_by_adapter(world: World) -> None:
    def count(name: str) -> float:
        text = world.served.http.get("/metrics").text
        return float(text.split(f"polypeft_adapter_{name} ")[1].split("\n")[0])

    requests = 'requests_total{adapter="topic"}'
    tokens = 'tokens_total{adapter="topic",kind="prompt"}'
    before = count(requests), count(tokens)
    world.post("classify", model="topic", input=["abc", "de"])
    world.post("embeddings", model="topic", input="f")
    assert (count(requests) - before[0], count(tokens) - before[1]) == (2, 6)


def test_many_clients_at_once(world: World) -> None:
    """Each gets its own answer, whatever the others ask for."""
    texts = [f"text {i} " * (1 + i % 4) for i in range(40)]
    names = ["mood", "topic", "spam", "score"]

    def ask(i: int) -> list[float]:
        name = names[i % len(names)]
        return world.post("classify", model=name, input=texts[i])["data"][0]["probs"]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(len(texts))))
    for i, probs in enumerate(found):
        logits = world.logits(names[i % len(names)], texts[i])
        want = logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)
        np.testing.assert_allclose(probs, want, atol=1e-4)
    world.served.wait_idle()


def test_what_does_not_classify_says_so(world: World) -> None:
    for model in ("tiny", "finder"):
        status, param, message = world.refused("classify", model=model, input="abc")
        assert (status, param) == (400, "model")
        assert "SEQ_CLS or TOKEN_CLS" in message
    assert world.refused("classify", model="nobody", input="abc")[0] == 404


def test_what_does_not_generate_says_so(world: World) -> None:
    generates = world.served.runtime.generates
    messages = [{"role": "user", "content": "hello"}]
    for model in ("mood", "names", "finder") if generates else ("tiny", "mood"):
        for path, body in [
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": messages}),
        ]:
            status, param, message = world.refused(path, model=model, **body)
            assert (status, param) == (400, "model")
            assert "/v1/classify or /v1/embeddings" in message
    if generates:
        assert world.served.complete("tiny", "abc") == world.served.expected("abc", [])


# -- uploads ---------------------------------------------------------------------------------------


def test_an_adapter_tells_its_task_and_labels(world: World) -> None:
    http = world.served.http
    mood, topic, finder = (
        http.get(f"/v1/adapters/{n}").json() for n in ("mood", "topic", "finder")
    )
    assert (mood["task"], mood["labels"]) == ("SEQ_CLS", LABELS)
    assert topic["labels"] == [f"LABEL_{i}" for i in range(5)]
    assert (finder["task"], finder["labels"]) == ("FEATURE_EXTRACTION", None)


def test_labels_are_the_names_and_not_the_weights(world: World) -> None:
    """The same bytes under other labels: the name changes, the digest does not."""
    folder = world.folders["mood"]
    first = world.served.push("other", folder)
    config = {"model_type": "bert", "id2label": {"1": "b", "0": "a", "2": "c"}, "hidden_size": 9}
    second = world.served.push("other", folder, id2label=json.dumps(config).encode())
    third = world.served.push("other", folder, id2label=b'["a", "b", "c"]')
    mood = world.served.http.get("/v1/adapters/mood").json()
    assert [a.json()["status"] for a in (first, second, third)] == [
        "created",
        "updated",
        "unchanged",
    ]
    assert first.json()["digest"] == second.json()["digest"] == mood["digest"]
    assert second.json()["labels"] == ["a", "b", "c"]
    assert mood["labels"] == LABELS
    item = world.post("classify", model="other", input="abc")["data"][0]
    same = world.post("classify", model="mood", input="abc")["data"][0]
    assert item["probs"] == pytest.approx(same["probs"], abs=1e-5)
    assert LABELS.index(same["label"]) == ["a", "b", "c"].index(item["label"])
    world.served.http.delete("/v1/adapters/other")


@pytest.mark.parametrize(
    ("labels", "status", "reason"),
    [
        (b'["a", "b"]', 422, "2 labels, but the adapter's head has 3"),
        (b'["a", "b", "b"]', 400, "one name"),
        (b'["a", "b", 3]', 400, "texts"),
        (b'["a", "b", ""]', 400, "texts"),
        (b'{"0": "a", "1": "b", "3": "c"}', 400, 'must be "0" to "2"'),
        (b"[]", 400, "expected a list"),
        (b"7", 400, "expected a list"),
        (b"{", 400, "not valid JSON"),
        (b'["\\ud800", "b", "c"]', 400, "not valid JSON"),
    ],
)
def test_refused_labels(world: World, labels: bytes, status: int, reason: str) -> None:
    answer = world.served.push("bad", world.folders["mood"], id2label=labels)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "id2label"
    assert reason in answer.json()["error"]["message"]
    assert world.served.http.get("/v1/adapters/bad").status_code == 404


def test_a_model_config_without_labels_says_nothing(world: World) -> None:
    answer = world.served.push("plain", world.folders["finder"], id2label=b'{"model_type": "bert"}')
    assert answer.status_code == 201, answer.text
    assert answer.json()["labels"] is None
    world.served.http.delete("/v1/adapters/plain")


def test_an_adapter_of_another_task_is_refused(world: World) -> None:
    folder = world.folders["mood"]
    for task, reason in [
        ("QUESTION_ANS", "not served on this base"),
        ("SEQ_2_SEQ_LM", "not served"),
    ]:
        config = json.loads((folder / CONFIG).read_bytes()) | {"task_type": task}
        answer = world.served.push("bad", folder, config=json.dumps(config).encode())
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "task_type"
        assert reason in answer.json()["error"]["message"]


def test_a_classifier_without_its_head_is_refused(world: World) -> None:
    folder = world.make("headless", "tokens", "SEQ_CLS", 3, 0)  # peft saves no head with these
    answer = world.served.push("headless", folder)
    head = "score" if world.served.runtime.generates else "classifier"
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == f"base_model.model.{head}.weight"
    assert "brings the head" in answer.json()["error"]["message"]
