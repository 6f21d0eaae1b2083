"""The OpenAI endpoints of a real server: answers, streams, usage, names of adapters, errors."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from peftcore import ops
from tests.server.api.conftest import Clients
from tests.serving import Served

JSON = {"Content-Type": "application/json"}
NOT_ADDITIVE = "mixture_not_additive"
HELLO = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Served, client_of: Clients) -> openai.OpenAI:
    # Its types of a stream of completions are wrong: test_openai_client.py has why.
    return client_of(server, _strict_response_validation=False)


def test_models(client: openai.OpenAI, server: Served) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert list(models) == ["tiny", "clerk", "herald", "poet"]
    assert models["tiny"]["parent"] is None
    digest = server.http.get("/v1/adapters/poet").json()["digest"]
    assert models["poet"]["root"] == f"poet@sha256:{digest}"
    assert models["poet"]["parent"] == "tiny"
    assert client.models.retrieve("poet").id == "poet"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/here")


def test_completion(client: openai.OpenAI, server: Served) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=12, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.choices[0].text == server.expected("abc", [])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    assert answer.usage.total_tokens == 15


def test_default_max_tokens(client: openai.OpenAI, server: Served) -> None:
    """16 for completions; for a chat, what the context has left."""
    text = client.completions.create(model="tiny", prompt="abc", **GREEDY)
    assert text.usage is not None
    assert text.usage.completion_tokens == 16
    chat = client.chat.completions.create(model="herald", messages=HELLO, **GREEDY)  # type: ignore[arg-type]
    assert chat.usage is not None
    num_virtual = server.http.get("/v1/adapters/herald").json()["num_virtual_tokens"]
    assert chat.usage.total_tokens == server.runtime.max_model_len - num_virtual
    assert chat.choices[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["poet", "clerk", "herald"])
def test_an_adapter_answers_as_peft_does(
    server: Served, adapter_folders: dict[str, Path], name: str
) -> None:
    assert server.complete(name, "abc") == server.expected("abc", [(adapter_folders[name], 1.0)])


def test_ways_to_name_an_adapter(client: openai.OpenAI, server: Served) -> None:
    digest = server.http.get("/v1/adapters/poet").json()["digest"]
    expected = server.complete("poet", "abc")
    assert expected != server.complete("tiny", "abc")
    for model in ("tiny:poet", f"poet@sha256:{digest[:8]}", f"tiny:poet@sha256:{digest}"):
        answer = client.completions.create(model=model, prompt="abc", max_tokens=12, **GREEDY)
        assert answer.choices[0].text == expected
        assert answer.model == model
    mixture = [{"name": "poet", "weight": 1.0}]
    assert server.complete("tiny", "abc", adapters=mixture) == expected
    assert server.complete("tiny", "abc", adapters=[{"name": "poet"}]) == expected


def test_a_mixture_answers_as_peft_does(server: Served, adapter_folders: dict[str, Path]) -> None:
    weights = {"poet": 0.7, "clerk": -0.4}
    text = server.complete(
        "tiny", "abc", adapters=[{"name": n, "weight": w} for n, w in weights.items()]
    )
    assert text == server.expected("abc", [(adapter_folders[n], w) for n, w in weights.items()])


def test_several_prompts_and_choices(client: openai.OpenAI, server: Served) -> None:
    """Choice j of prompt i is number i·n + j; a prompt counts once in the usage."""
    ids = server.runtime.tokenizer.encode
    for prompt in (["abc", "xy"], [ids("abc"), ids("xy")]):
        answer = client.completions.create(
            model="poet", prompt=prompt, n=2, max_tokens=12, **GREEDY
        )
        first, second = server.complete("poet", "abc"), server.complete("poet", "xy")
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        assert [c.text for c in answer.choices] == [first, first, second, second]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 48)


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="abc", n=3, seed=seed, max_tokens=12
        )
        return [choice.text for choice in answer.choices]

    assert draw(1) == draw(1)
    assert len(set(draw(1))) == 3
    assert draw(1) != draw(2)


def test_completion_stream(client: openai.OpenAI, server: Served) -> None:
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    stream = client.completions.create(
        model="poet", prompt=["abc", "xy"], max_tokens=12, stream=True,
        stream_options={"include_usage": True}, **GREEDY,
    )  # fmt: skip
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    usage = chunks[-1].usage
    assert texts == {0: server.complete("poet", "abc"), 1: server.complete("poet", "xy")}
    assert reasons == {0: "length", 1: "length"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 24)
    assert chunks[-1].choices == []


def test_chat_stream_equals_chat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "messages": HELLO, "max_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**fields, **GREEDY)
    texts = {0: "", 1: ""}
    chunks = list(client.chat.completions.create(**fields, stream=True, **GREEDY))
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    for index in texts:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
    assert {chunk.model for chunk in chunks} == {"poet"}


def test_raw_stream(server: Served) -> None:
    """Events are `data: …` with an empty line after each, and `[DONE]` is the last."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "usage" not in chunks[0]
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_stop_string(client: openai.OpenAI, server: Served) -> None:
    text = server.complete("poet", "abc", max_tokens=40)
    stop = next(c for c in text[3:] if text.count(c) and c != "\ufffd")
    answer = client.completions.create(
        model="poet", prompt="abc", max_tokens=40, stop=[stop, "never"], **GREEDY
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "a prompt of more than one block, asked twice"

    def cached(model: str) -> int | None:
        usage = client.completions.create(model=model, prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert cached("clerk") == 0
    assert (cached("clerk") or 0) >= 32
    assert cached("tiny") == 0, "one adapter's cache is not another's"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "poet", "messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields, **GREEDY).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) == 5
    for entry in whole.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "the greedy token is the likeliest"
        assert entry.logprob <= 0
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry
        for chunk in client.chat.completions.create(**fields, stream=True, **GREEDY)
        if (logprobs := chunk.choices[0].logprobs) is not None
        for entry in logprobs.content or []
    ]
    assert [e.token for e in streamed] == [e.token for e in whole.content]
    assert [e.logprob for e in streamed] == pytest.approx(
        [e.logprob for e in whole.content], abs=1e-4
    )


def test_completion_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "abc", "max_tokens": 5, "logprobs": 2}
    whole = client.completions.create(**fields, **GREEDY).choices[0].logprobs
    assert whole is not None
    assert whole.tokens is not None
    assert whole.text_offset is not None
    assert whole.top_logprobs is not None
    assert len(whole.tokens) == len(whole.token_logprobs or []) == len(whole.text_offset) == 5
    assert whole.text_offset[0] == 0
    assert all(token in top for token, top in zip(whole.tokens, whole.top_logprobs, strict=True))
    offsets = [
        offset
        for chunk in client.completions.create(**fields, stream=True, **GREEDY)
        if chunk.choices[0].logprobs is not None
        for offset in chunk.choices[0].logprobs.text_offset or []
    ]
    assert offsets == whole.text_offset


def test_many_clients_at_once(client: openai.OpenAI, server: Served) -> None:
    names = ["tiny", "poet", "clerk", "herald"]
    expected = {name: server.complete(name, "abc") for name in names}

    def ask(i: int) -> tuple[str, str]:
        name = names[i % 4]
        stream = client.completions.create(
            model=name, prompt="abc", max_tokens=12, stream=True, **GREEDY
        )
        return name, "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        for name, text in pool.map(ask, range(24)):
            assert text == expected[name]


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"model": "other:poet"}, 404, "model", "model_not_found"),
        ({"model": "poet@sha256:0000"}, 404, "model", "model_not_found"),
        ({"model": "../poet"}, 404, "model", "model_not_found"),
        ({"adapters": [{"name": "nobody"}]}, 404, "adapters", "model_not_found"),
        ({"adapters": [{"name": "herald"}, {"name": "poet"}]}, 422, "adapters", NOT_ADDITIVE),
        ({"adapters": [{"name": "herald", "weight": 0.5}]}, 422, "adapters", NOT_ADDITIVE),
        ({"model": "poet", "adapters": [{"name": "clerk"}]}, 400, "model", None),
        ({"adapters": [{"name": "poet"}, {"name": "poet"}]}, 400, "adapters", None),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
        ({"colour": "red"}, 400, "colour", "unknown_parameter"),
        ({"messages": None}, 400, "messages", "missing_required_parameter"),
        ({"messages": [{"role": "x", "content": ""}]}, 400, "messages[0].role", "invalid_value"),
        ({"max_tokens": 600}, 400, "messages", "context_length_exceeded"),
        ({"stop_token_ids": [300]}, 400, "stop_token_ids", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_chat_errors(
    server: Served, changes: dict[str, Any], status: int, param: str, code: str | None, stream: bool
) -> None:
    """Also of a stream: what is refused has its status, not a 200 and an event."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "stream": stream} | changes
    answer = server.http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


def test_context_too_long_tells_both_numbers(server: Served) -> None:
    body = {"model": "tiny", "prompt": "x" * 600}
    error = server.http.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "prompt"
    assert "600" in error["message"]
    assert "512" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_refuses_all(server: Served, stream: bool) -> None:
    body = {"model": "poet", "prompt": ["abc", "x" * 600, "y"], "n": 2, "stream": stream}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    server.wait_idle()


@pytest.mark.parametrize("ids", [[300], [-1], [1, 2**70]])
def test_token_ids_outside_the_vocabulary(server: Served, ids: list[int]) -> None:
    answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": ids})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", JSON), (b"{", JSON), (b"[]", JSON), (b'"text"', JSON), (b"\xff\xfe", JSON),
        (b"{}", {}), (b"{}", {"Content-Type": "text/plain"}), (b"[" * 100_000, JSON),
        (b'{"model": "tiny", "prompt": "a", "seed": NaN}', JSON),
        (b'{"model": "tiny", "prompt": "a", "\\udcff": 1}', JSON),
        (b'{"model": "tiny", "prompt": "\\udcff"}', JSON),
        (b'{"model": "\\udcff", "prompt": "a"}', JSON),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(
    server: Served, content: bytes, headers: dict[str, str]
) -> None:
    answer = server.http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_early(server: Served) -> None:
    def endless() -> Any:
        for _ in range(20):
            yield b" " * (1 << 20)

    for content in (b" " * (20 << 20), endless()):
        answer = server.http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413
        assert str(8 << 20) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/adapters", 405)],
)
def test_no_such_endpoint(server: Served, method: str, path: str, status: int) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == f"there is no {method} {path}"


def test_health_and_metrics(server: Served) -> None:
    health = server.http.get("/health").json()
    assert (health["status"], health["model"]) == ("ok", "tiny")
    assert health["kernels"] == ops.status(torch.device("cpu")), "what computes"
    server.complete("poet", "metrics")
    text = server.http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['polypeft_requests_total{endpoint="/v1/completions",status="200"}']) > 0
    assert float(values["polypeft_generated_tokens_total"]) >= 12
    assert float(values["polypeft_time_to_first_token_seconds_count"]) > 0
    assert float(values["polypeft_inter_token_seconds_count"]) >= 11
    assert float(values['polypeft_adapter_bytes{tier="device"}']) > 0
    server.http.get("/never/heard/of")
    text = server.http.get("/metrics").text
    assert "never" not in text, "a client's words are no labels"


def test_openapi_describes_the_errors(server: Served) -> None:
    description = server.http.get("/openapi.json").json()
    for path in description["paths"].values():
        for operation in path.values():
            refusals = {k: v for k, v in operation["responses"].items() if int(k) >= 400}
            assert refusals
            for answer in refusals.values():
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert "security" not in description, "this server needs no key"
