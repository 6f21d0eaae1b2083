"""Texts that match what the request says, by a model that means nothing; and what is refused."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.engine import grammars, guided
from tests.serving import Served, serve

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -5, "maximum": 5}, "on": {"type": "boolean"},
    },
    "required": ["x", "on"],
}  # fmt: skip
ROUTES = ("completions", "chat/completions")


def ask(server: Served, route: str = "completions", **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 120, "seed": 1} | fields
    text = "say something"
    body |= (
        {"prompt": text}
        if route == "completions"
        else {"messages": [{"role": "user", "content": text}]}
    )
    answer = server.http.post(f"/v1/{route}", json=body)
    return {"status": answer.status_code, **answer.json()}


def text_of(answer: dict[str, Any]) -> str:
    assert answer["status"] == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice.get("text") or choice["message"]["content"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_every_way_to_say_it(server: Served, route: str, temperature: float) -> None:
    fields = {"temperature": temperature}
    for way in ({"guided_json": POINT}, {"guided_json": json.dumps(POINT)},
                {"structured_outputs": {"json": POINT}}):  # fmt: skip
        found = json.loads(text_of(ask(server, route, **fields, **way)))
        jsonschema.validate(found, POINT)
    for way in ({"guided_regex": "[a-c]{3,5}x"}, {"structured_outputs": {"regex": "[a-c]{3,5}x"}}):
        assert re.fullmatch("[a-c]{3,5}x", text_of(ask(server, route, **fields, **way)))
    choices = ["yes", 'no "é"\n', "\U0001f600"]
    for way in ({"guided_choice": choices}, {"structured_outputs": {"choice": choices}}):
        assert text_of(ask(server, route, **fields, **way)) in choices
    grammar = 'root ::= "(" (root | "x") ")"'
    for way in ({"guided_grammar": grammar}, {"structured_outputs": {"grammar": grammar}}):
        bias = {"logit_bias": {"87": 50}}  # x, so that it ends
        text = text_of(ask(server, route, **fields, **way, **bias))
        assert re.fullmatch(r"\(+x\)+", text)
        assert text.count("(") == text.count(")")


def test_json_object(server: Served) -> None:
    bias = {str(server.runtime.tokenizer.encode("}")[0]): 100}
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
    ):
        answer = ask(server, "chat/completions", **fields, logit_bias=bias)
        assert isinstance(json.loads(text_of(answer)), dict)


def test_an_adapters_answer(server: Served) -> None:
    for model in ("poet", "herald"):
        jsonschema.validate(json.loads(text_of(ask(server, model=model, guided_json=POINT))), POINT)


def test_choices_stops_and_streams(server: Served) -> None:
    answer = ask(server, guided_json=POINT, n=4)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), POINT)
    assert text_of(ask(server, guided_choice=["yes"], stop=["s"])) == "ye"
    body = {
        "model": "tiny",
        "prompt": "say",
        "guided_json": POINT,
        "stream": True,
        "max_tokens": 99,
    }
    events = server.http.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    chunks = [json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events]
    jsonschema.validate(json.loads("".join(chunks)), POINT)


def test_the_grammars_end_is_the_end(server: Served) -> None:
    """Whatever else the request says; and where there is no room, the reason says so."""
    assert text_of(ask(server, guided_choice=["yes"], min_tokens=50, ignore_eos=True)) == "yes"
    bias = {"logit_bias": {"256": -100}}
    assert text_of(ask(server, guided_choice=["yes"], **bias)) == "yes"
    cut = ask(server, guided_choice=["yes"], max_tokens=2)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == ("ye", "length")
    long = ask(server, guided_regex="[ab]*", min_tokens=50, max_tokens=60, temperature=0)
    assert 50 <= len(long["choices"][0]["text"]) <= 60


def test_logprobs_are_those_of_the_model(server: Served) -> None:
    answer = ask(server, guided_choice=["qqq"], logprobs=0, temperature=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["q"] * 3
    assert max(logprobs["token_logprobs"]) < 0, "nothing is certain to the model"


def test_with_others_in_a_batch_and_preemption(tmp_path: Path) -> None:
    with serve(tmp_path, kv_memory="100KiB", max_num_seqs=8) as server:
        expected = {p: server.complete("tiny", p) for p in ("abc", "xy")}

        def one(i: int) -> None:
            if i % 2:
                found = json.loads(text_of(ask(server, guided_json=POINT, seed=i, max_tokens=99)))
                jsonschema.validate(found, POINT)
            else:
                prompt = ("abc", "xy")[i // 2 % 2]
                assert server.complete("tiny", prompt) == expected[prompt]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(40)))
        assert server.runtime.engine.scheduler.num_preemptions > 0
        server.wait_idle()
        assert not server.runtime.engine.sampler._guides._matchers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "integer", "multipleOf": 3}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_grammar": "root ::= nothing"}, "guided_grammar"),
        ({"guided_regex": "[a", "seed": 2}, "guided_regex"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_refused_by_name(server: Served, route: str, fields: dict[str, Any], param: str) -> None:
    for _ in range(2):  # the second answer is remembered
        answer = ask(server, route, **fields)
        assert answer["status"] == 400, answer
        assert answer["error"]["param"] == param
        assert "/" not in answer["error"]["message"], "no paths of a library"


def test_a_long_source_is_too_large(server: Served) -> None:
    answer = ask(server, guided_regex="a" * (grammars.MAX_SOURCE_BYTES + 1))
    assert (answer["status"], answer["error"]["param"]) == (413, "guided_regex")


def test_a_grammar_that_allows_nothing(server: Served) -> None:
    answer = ask(server, guided_grammar='root ::= "a" root')
    assert answer["status"] in (200, 400), "endless"
    server.wait_idle()


def test_a_compilation_that_takes_too_long(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended; meanwhile others are answered, and afterwards all is as before."""
    monkeypatch.setattr(grammars, "MAX_SECONDS", 1.5)
    strings = {f"p{i}": {"type": "string", "maxLength": 40 + i} for i in range(300)}
    schema = {"type": "object", "properties": strings}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, server, guided_json=schema)
        num_answers = 0
        while not slow.done():
            start = time.perf_counter()
            server.complete("tiny", "abc", max_tokens=2)
            assert time.perf_counter() - start < 1
            num_answers += 1
        answer = slow.result()
    assert num_answers > 3
    assert answer["status"] == 400, answer
    assert "1.5 s" in answer["error"]["message"]
    assert text_of(ask(server, guided_choice=["yes"])) == "yes"


def test_a_grammar_too_ambiguous_ends_its_own_request_alone(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "MAX_MASK_SECONDS", -1.0)
    answer = ask(server, guided_choice=["yes"])
    assert (answer["status"], "ambiguous" in answer["error"]["message"]) == (400, True)
    assert len(server.complete("tiny", "abc")) > 0
    server.wait_idle()


def test_the_cache_is_bounded(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_CACHE_BYTES", 8_000)
    for i in range(10):
        text_of(ask(server, guided_choice=[f"text {i}"]))
        ask(server, guided_regex=f"(?=a){i}")
    kept = server.runtime.grammars
    assert kept._num_bytes <= 8_000
    assert kept._num_bytes == sum(map(grammars._size, kept._kept.values()))
