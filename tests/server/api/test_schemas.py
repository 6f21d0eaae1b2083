"""What requests may say, without a server: ranges, neutral values, names in the errors."""

from __future__ import annotations

from typing import Any

import openai
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.embedding_create_params
import pytest
from pydantic import BaseModel, ValidationError

from server.api.pooling_schemas import EmbeddingRequest
from server.api.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.engine.sequence import SamplingParams
from server.errors import BadRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(CHAT | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(COMPLETION | fields)


def refusal(kind: type[GenerationRequest], body: dict[str, Any]) -> tuple[str, str]:
    """The first field at fault, and the kind of error."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    first = caught.value.errors()[0]
    return ".".join(map(str, first["loc"])), first["type"]


def test_defaults_are_neutral() -> None:
    assert completion().sampling(100) == SamplingParams(max_tokens=16)
    assert chat().sampling(50, 100) == SamplingParams(max_tokens=50)
    assert chat().sampling(-3, 100).max_tokens == 1, "the engine then tells both numbers"


def test_null_is_as_good_as_not_given() -> None:
    fields = dict.fromkeys(ChatCompletionRequest.model_fields.keys() - CHAT.keys())
    assert chat(**fields) == chat()
    fields = dict.fromkeys(CompletionRequest.model_fields.keys() - COMPLETION.keys())
    assert completion(**fields) == completion()


def test_every_sampling_field_arrives() -> None:
    params = completion(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=-0.4, seed=-5, stop="end", stop_token_ids=[3, 4],
        min_tokens=2, ignore_eos=True, logprobs=5, logit_bias={"7": -100, "8": 0.5},
    ).sampling(100)  # fmt: skip
    assert params == SamplingParams(
        7, 0.5, 0.9, 3, 0.1, 1.2, 0.3, -0.4, -5, ("end",), (3, 4), 2, True, 5,
        ((7, -100.0), (8, 0.5)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")),
        ("temperature", "0.5"), ("temperature", True), ("top_p", 0), ("top_p", 1.01),
        ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0),
        ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("n", 0), ("n", 17), ("n", True),
        ("max_tokens", 0), ("min_tokens", -1), ("seed", 2**63), ("stop", [""]), ("stop", ""),
        ("stop", ["a"] * 5), ("stop", [1]), ("stop", "\udcff"), ("model", "\udcff"),
        ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("logit_bias", [1]),
        ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}), ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {str(i): 1 for i in range(1025)}), ("guided_json", 5),
        ("guided_regex", ""), ("guided_choice", []), ("guided_choice", [1]),
        ("structured_outputs", {"lark": "x"}), ("structured_outputs", {"json_object": False}),
        ("ignore_eos", 1), ("stream", "yes"), ("adapters", []), ("adapters", [{"weight": 1}]),
        ("adapters", [{"name": "a", "weight": float("inf")}]), ("adapters", [{"name": ""}]),
        ("adapters", [{"name": "a", "scale": 2}]), ("model", ""), ("model", 5),
        ("stream_options", {"include": 1}), ("stream_options", {"include_obfuscation": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_out_of_range_names_the_field(
    kind: type[GenerationRequest], field: str, value: Any
) -> None:
    if kind is CompletionRequest and (field, value) == ("max_tokens", 0):
        return  # with echo it has a meaning
    body = CHAT if kind is ChatCompletionRequest else COMPLETION
    assert refusal(kind, body | {field: value})[0].split(".")[0] == field


@pytest.mark.parametrize(
    ("field", "neutral", "loaded"),
    [
        ("functions", [], [{"name": "f"}]),
        ("function_call", "none", {"name": "f"}),
        ("modalities", ["text"], ["text", "audio"]),
        ("audio", None, {"voice": "v", "format": "wav"}), ("prediction", None, {"type": "content"}),
        ("reasoning_effort", "none", "high"), ("verbosity", "medium", "low"),
        ("web_search_options", None, {}), ("moderation", None, {"model": "m"}),
    ],
)  # fmt: skip
def test_chat_refuses_by_name_what_it_does_not_do(field: str, neutral: Any, loaded: Any) -> None:
    chat(**{field: neutral})
    assert refusal(ChatCompletionRequest, CHAT | {field: loaded}) == (field, "unsupported")


def test_completions_refuse_by_name_what_they_do_not_do() -> None:
    completion(suffix="", add_special_tokens=True)
    for field, value in {"suffix": "end", "add_special_tokens": False}.items():
        assert refusal(CompletionRequest, COMPLETION | {field: value}) == (field, "unsupported")


@pytest.mark.parametrize(
    ("field", "neutral", "loaded"),
    [
        ("skip_special_tokens", True, False), ("spaces_between_special_tokens", True, False),
        ("include_stop_str_in_output", False, True), ("use_beam_search", False, True),
        ("length_penalty", 1.0, 1.5), ("truncate_prompt_tokens", None, 5),
        ("prompt_logprobs", None, 1), ("allowed_token_ids", None, [5]), ("bad_words", [], ["x"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)]
)
def test_vllms_fields_are_refused_by_name(
    kind: type[GenerationRequest], body: dict[str, Any], field: str, neutral: Any, loaded: Any
) -> None:
    """But with vLLM's defaults, which its users' requests spell out: these are what is done."""
    kind.model_validate(body | {field: neutral})
    assert refusal(kind, body | {field: loaded}) == (field, "unsupported")


@pytest.mark.parametrize(
    ("field", "neutral", "loaded"),
    [
        ("add_generation_prompt", True, False), ("continue_final_message", False, True),
        ("add_special_tokens", False, True), ("echo", False, True), ("chat_template", None, "x"),
        ("chat_template_kwargs", {}, {"enable_thinking": False}), ("documents", [], [{}]),
    ],
)  # fmt: skip
def test_vllms_fields_of_chats_are_refused_by_name(field: str, neutral: Any, loaded: Any) -> None:
    chat(**{field: neutral})
    assert refusal(ChatCompletionRequest, CHAT | {field: loaded}) == (field, "unsupported")


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (openai.types.chat.completion_create_params.CompletionCreateParamsBase,
         ChatCompletionRequest),
        (openai.types.completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        (openai.types.embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    ],
)  # fmt: skip
def test_every_field_of_openais_is_known(params: Any, kind: type[BaseModel]) -> None:
    """Served, a label, or refused as not supported: a field of OpenAI's is not "no such field"."""
    assert len(params.__annotations__) >= 5
    assert params.__annotations__.keys() <= kind.model_fields.keys()


@pytest.mark.parametrize("value", [1, None, False])
def test_unknown_fields_are_refused_even_when_null(value: Any) -> None:
    assert refusal(ChatCompletionRequest, CHAT | {"temprature": value}) == (
        "temprature",
        "extra_forbidden",
    )


def test_labels_are_accepted() -> None:
    chat(
        user="u", metadata={"k": "v"}, store=True, service_tier="auto", safety_identifier="s",
        prompt_cache_key="k", parallel_tool_calls=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompt_forms(prompt: Any, parsed: Any) -> None:
    assert completion(prompt=prompt).prompt == parsed


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], ["a", ""], [[]], ["a", 1], [[1], "a"], [1, True], [1.5], {"a": 1}, 7, None,
     ["a"] * 65, "\ud800", [[1, "a"]]],
)  # fmt: skip
def test_prompt_refusals(prompt: Any) -> None:
    assert refusal(CompletionRequest, COMPLETION | {"prompt": prompt})[0] == "prompt"


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert request.messages[0].to_template() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": "\udcff"}, "content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content"),
        ({"role": "user", "content": [{"type": "text"}]}, "content"),
        ({"role": "user", "content": ["a"]}, "content"),
        ({"role": "tool", "content": "a"}, "tool_call_id"),
        ({"role": "user", "content": "a", "tool_call_id": "c"}, "tool_call_id"),
        ({"role": "tool", "tool_call_id": "c"}, "content"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content"),
        ({"content": "a"}, "role"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "tool_calls.0.id"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "tool_calls"),
        (
            {
                "role": "assistant",
                "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}],
            },
            "tool_calls.0.function.arguments",
        ),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "user", "content": "a", "colour": "red"}, "colour"),
    ],
)
def test_message_refusals(message: Any, where: str) -> None:
    loc, _ = refusal(ChatCompletionRequest, {"model": "m", "messages": [message]})
    assert loc == f"messages.0.{where}"


def test_an_answer_can_be_sent_back() -> None:
    """The message of an answer, as the official client dumps it, is a valid turn."""
    turn = {
        "role": "assistant", "content": "hello", "refusal": None, "annotations": None,
        "audio": None, "function_call": None, "tool_calls": None,
    }  # fmt: skip
    assert chat(messages=[turn]).messages[0].content == "hello"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields).sampling(50, vocab_size=100)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
def test_fields_of_completions_that_contradict_each_other(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**fields).sampling(100)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_json": True, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_regex": "("}, "guided_regex"),
    ],
)
def test_a_text_matches_one_thing(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields).constraint()
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "grammar"}), ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b"}}),
        ("tools", [{"type": "function"}]), ("tools", [{"type": "web", "function": {}}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]), ("tools", [TOOL] * 129),
        ("tool_choice", "always"), ("tool_choice", {"type": "function"}),
        ("parallel_tool_calls", "yes"),
    ],
)  # fmt: skip
def test_formats_and_tools_that_are_malformed(field: str, value: Any) -> None:
    assert refusal(ChatCompletionRequest, CHAT | {field: value})[0].split(".")[0] == field


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_ways_to_say_all_tokens(top_k: int | None) -> None:
    assert completion(top_k=top_k).sampling(100).top_k is None


def test_tiny_temperatures_are_greedy() -> None:
    assert completion(temperature=1e-300).sampling(100).temperature == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20), ({}, None)],
)
def test_chat_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    assert chat(**fields).sampling(50, 100).logprobs == expected
