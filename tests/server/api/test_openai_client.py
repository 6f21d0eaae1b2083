"""The official client with strict validation: every answer has exactly OpenAI's types."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from tests.server.api.conftest import Clients
from tests.serving import Served

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Served, client_of: Clients) -> openai.OpenAI:
    return client_of(server)


class EchoedLogprobs(Logprobs):
    """The client's type, and null for a prompt's first token, which has no probability."""

    token_logprobs: list[float | None]  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None]  # type: ignore[assignment]


class EchoedChoice(CompletionChoice):
    logprobs: EchoedLogprobs


class Echoed(Completion):
    choices: list[EchoedChoice]  # type: ignore[assignment]


class ChunkChoice(CompletionChoice):
    """The client's type, and null before a choice's end, which OpenAI's own streams have too."""

    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class Chunk(Completion):
    choices: list[ChunkChoice]  # type: ignore[assignment]


class Step(pydantic.BaseModel):
    kind: Literal["add", "subtract"]
    amount: int = pydantic.Field(ge=0, le=99)


class Plan(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=10)
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
    note: str | None = pydantic.Field(max_length=5)


def test_models(client: openai.OpenAI) -> None:
    assert next(model.id for model in client.models.list()) == "tiny"
    assert client.models.retrieve("poet").object == "model"


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="poet", prompt="abc", max_tokens=4, logprobs=2, best_of=2, n=2
    )
    assert len(whole.choices) == 2
    echoed = client.completions.create(model="poet", prompt="abc", max_tokens=1, echo=True)
    assert echoed.choices[0].text.startswith("abc")


def test_a_stream_of_completions(client: openai.OpenAI) -> None:
    """The client's type of an answer is its type of a chunk too, and its validation refuses the
    null `finish_reason` of every stream: all but that is validated."""
    fields: dict[str, Any] = {
        "model": "poet", "prompt": ["abc", "de"], "max_tokens": 4, "logprobs": 2, "n": 2,
        "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    chunks = list(
        client.post(
            "/completions", cast_to=Chunk, body=fields | {"stream": True}, stream=True,
            stream_cls=openai.Stream[Chunk],
        )
    )  # fmt: skip
    *said, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 16
    assert {chunk.usage for chunk in said} == {None}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    whole = client.post("/completions", cast_to=Completion, body=fields | {"stream_options": None})
    for choice in whole.choices:
        own = [c for chunk in said for c in chunk.choices if c.index == choice.index]
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
        assert "".join(c.text for c in own) == choice.text
        whole_logprobs = choice.logprobs
        assert whole_logprobs is not None
        found = {
            name: list(chain(*(getattr(c.logprobs, name) for c in own if c.logprobs is not None)))
            for name in Logprobs.model_fields
        }
        assert found["tokens"] == whole_logprobs.tokens
        assert found["text_offset"] == whole_logprobs.text_offset
        assert found["token_logprobs"] == pytest.approx(whole_logprobs.token_logprobs, abs=1e-4)
        for top, expected in zip(
            found["top_logprobs"], whole_logprobs.top_logprobs or [], strict=True
        ):
            assert top == pytest.approx(expected, abs=1e-4)


def test_an_echoed_prompts_first_token_has_no_probability(client: openai.OpenAI) -> None:
    body = {"model": "poet", "prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 1}
    (choice,) = client.post("/completions", cast_to=Echoed, body=body).choices
    first, *rest = choice.logprobs.token_logprobs
    assert first is None
    assert None not in rest


@pytest.mark.parametrize("num_top", [None, 0, 4])
def test_chats(client: openai.OpenAI, num_top: int | None) -> None:
    fields: dict[str, Any] = {
        "model": "poet", "messages": HELLO, "max_completion_tokens": 6, "temperature": 0,
        "logprobs": True, "top_logprobs": num_top, "seed": 3, "stop": ["zz"], "n": 2,
        "logit_bias": {"65": 5},
    }  # fmt: skip
    whole = client.chat.completions.create(**fields)
    found: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    texts = {0: "", 1: ""}
    *chunks, last = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.logprobs is not None:
            for entry in choice.logprobs.content or []:
                found[choice.index].append((entry.token, len(entry.top_logprobs)))
    for choice in whole.choices:
        assert choice.logprobs is not None
        expected = [(e.token, len(e.top_logprobs)) for e in choice.logprobs.content or []]
        assert found[choice.index] == expected
        assert len(expected) == 6
        assert {n for _, n in expected} == {num_top or 0}
        assert texts[choice.index] == choice.message.content


def test_parse_gives_a_pydantic_model(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.parse(
            model="poet", messages=HELLO, response_format=Plan, max_tokens=300, seed=seed
        )
        message = answer.choices[0].message
        assert isinstance(message.parsed, Plan)
        assert Plan.model_validate(json.loads(message.content or "")) == message.parsed


def test_parsed_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, response_format=Plan, max_tokens=300, seed=1
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Plan)


def test_errors_have_their_types(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="tiny", messages=HELLO, reasoning_effort="high")
    assert (bad.value.param, bad.value.code) == ("reasoning_effort", "unsupported_parameter")
    schema = {"name": "x", "schema": {"type": "integer", "multipleOf": 2}}
    with pytest.raises(openai.BadRequestError) as bad:
        create(
            model="tiny", messages=HELLO,
            response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[typeddict-item]
        )  # fmt: skip
    assert bad.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.APIStatusError) as large:
        create(model="tiny", messages=[{"role": "user", "content": "x" * (9 << 20)}])
    assert large.value.status_code == 413


def test_tokenize_and_back(server: Served) -> None:
    def post(path: str, **body: Any) -> Any:
        answer = server.http.post(path, json=body)
        return answer.json() if answer.status_code == 200 else answer.json()["error"]["param"]

    tokenizer = server.runtime.tokenizer
    found = post("/tokenize", model="poet", prompt="héllo")
    ids = tokenizer.encode("héllo")
    assert found == {"tokens": ids, "count": 6, "max_model_len": 512}
    assert post("/detokenize", tokens=ids) == {"prompt": "héllo"}
    found = post("/tokenize", model="herald", messages=HELLO)
    assert found["tokens"] == tokenizer.chat(HELLO)
    info = server.http.get("/v1/adapters/herald").json()
    assert found["max_model_len"] == 512 - info["num_virtual_tokens"]
    without = post("/tokenize", messages=HELLO, add_generation_prompt=False)
    assert tokenizer.text(without["tokens"]) == "<user>hello\n"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    usage = server.http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == post("/tokenize", messages=HELLO)["count"]
    assert post("/detokenize", tokens=[300]) == "tokens"
    assert post("/tokenize", model="nobody", prompt="a") == "model"
    assert post("/tokenize") == "prompt"
    assert post("/tokenize", prompt="a", messages=HELLO) == "prompt"
