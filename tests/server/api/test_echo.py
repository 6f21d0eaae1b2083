"""Prompts given back with their log probabilities, the best of several, biases: against peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.server.api.conftest import Clients
from tests.serving import Served, serve

PROMPT = "a prompt that is longer than a few blocks of the cache"


def echoed(server: Served, model: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "echo": True, "logprobs": 3, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body | {"max_tokens": 0} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(server: Served, choice: dict[str, Any], prompt: str, folder: Path | None) -> None:
    """The log probabilities of a choice's prompt are those of peft."""
    oracle = tiny.PeftOracle(server.model, [(folder, 1.0)] if folder else [])
    tokenizer = server.runtime.tokenizer
    ids = tokenizer.encode(prompt)
    found = choice["logprobs"]
    expected = torch.log_softmax(oracle.logits(ids).float(), dim=-1)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for i in range(1, len(ids)):
        own = float(expected[i - 1, ids[i]])
        assert found["token_logprobs"][i] == pytest.approx(own, abs=2e-4)
        best = expected[i - 1].topk(3)
        likeliest: dict[str, float] = {}
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            likeliest.setdefault(tokenizer.token_text(token), value)
        likeliest.setdefault(prompt[i], own)
        assert found["top_logprobs"][i] == pytest.approx(likeliest, abs=2e-4)


@pytest.mark.parametrize("model", ["tiny", "poet", "herald"])
def test_prompt_logprobs_are_those_of_peft(
    server: Served, adapter_folders: dict[str, Path], model: str
) -> None:
    """Also when the prompt lies in the cache already, and as token ids."""
    for prompt in (PROMPT, PROMPT, server.runtime.tokenizer.encode(PROMPT)):
        answer = echoed(server, model, prompt)
        choice = answer["choices"][0]
        assert choice["text"] == PROMPT
        assert choice["finish_reason"] == "length"
        check(server, choice, PROMPT, adapter_folders.get(model))
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_prompt_and_output(server: Served, adapter_folders: dict[str, Path]) -> None:
    answer = echoed(server, "poet", [PROMPT, "xy"], max_tokens=6, n=2, ignore_eos=True, logprobs=3)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    for choice, prompt in zip(answer["choices"], [PROMPT] * 2 + ["xy"] * 2, strict=True):
        assert choice["text"] == prompt + server.complete("poet", prompt, max_tokens=6)
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 6
        assert choice["logprobs"]["text_offset"][: len(prompt)] == list(range(len(prompt)))


def test_echo_alone(server: Served) -> None:
    answer = echoed(server, "tiny", "abc", logprobs=None, max_tokens=4, ignore_eos=True)
    assert answer["choices"][0]["text"] == "abc" + server.complete("tiny", "abc", max_tokens=4)
    assert answer["choices"][0]["logprobs"] is None


def test_streamed(server: Served, client_of: Clients) -> None:
    client = client_of(server, _strict_response_validation=False)
    fields: dict[str, Any] = {
        "model": "poet", "prompt": ["abc", "xy"], "echo": True, "logprobs": 2, "max_tokens": 5,
        "temperature": 0,
    }  # fmt: skip
    whole = client.completions.create(**fields)
    texts, tokens = {0: "", 1: ""}, {0: [], 1: []}  # type: ignore[var-annotated]
    for chunk in client.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.token_logprobs or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.logprobs is not None
        expected = choice.logprobs.token_logprobs
        assert tokens[choice.index][1:] == pytest.approx(expected[1:], abs=1e-4)


def test_chunks_and_preemption(tmp_path: Path) -> None:
    """Prompts in several chunks, in a cache too small for them all: each token is scored once."""
    settings = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "kv_memory": "100KiB"}
    with serve(tmp_path, **settings) as server:
        prompts = [PROMPT[i:] + PROMPT[: i + 7] for i in range(4)]
        answer = echoed(server, "tiny", prompts, max_tokens=12, ignore_eos=True)
        assert server.runtime.engine.scheduler.num_preemptions > 0
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + 12
            check(server, choice, prompt, None)


def test_best_of(server: Served) -> None:
    """The best by mean log probability of what the same seeds give one by one."""
    fields = {"model": "tiny", "prompt": ["abc", "x"], "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = server.http.post("/v1/completions", json=fields | {"n": 4}).json()["choices"]
    answer = server.http.post("/v1/completions", json=fields | {"n": 2, "best_of": 4}).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    for i in range(2):
        best = sorted(every[4 * i : 4 * i + 4], key=mean, reverse=True)[:2]
        found = answer["choices"][2 * i : 2 * i + 2]
        assert [c["text"] for c in found] == [c["text"] for c in best]
    assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)
    plain = {k: v for k, v in fields.items() if k != "logprobs"} | {"best_of": 4}
    choices = server.http.post("/v1/completions", json=plain).json()["choices"]
    assert [c["logprobs"] for c in choices] == [None, None]
    assert choices[0]["text"] == answer["choices"][0]["text"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_logit_bias(server: Served, route: str) -> None:
    """100 makes a token certain, −100 keeps it away; log probabilities stay the model's own."""
    body: dict[str, Any] = {"model": "poet", "max_tokens": 4, "logprobs": 1, "temperature": 1}
    if route == "completions":
        body["prompt"] = "abc"
    else:
        body |= {"messages": [{"role": "user", "content": "abc"}], "logprobs": True}
    letter = server.runtime.tokenizer.encode("q")[0]
    answer = server.http.post(f"/v1/{route}", json=body | {"logit_bias": {str(letter): 100}})
    choice = answer.json()["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == "qqqq"
    logprobs = choice["logprobs"]
    values = logprobs.get("token_logprobs") or [e["logprob"] for e in logprobs["content"]]
    assert max(values) < -0.01, "of the distribution without the bias"
    for bias in ({"300": 1}, {"a": 1}, {"5": 200}):
        refused = server.http.post(f"/v1/{route}", json=body | {"logit_bias": bias})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")


def test_plain_requests_use_the_cache_of_scored_ones(server: Served) -> None:
    prompt = "scored first, then asked as any other request"
    echoed(server, "clerk", prompt)
    body = {"model": "clerk", "prompt": prompt, "max_tokens": 1}
    usage = server.http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 40
