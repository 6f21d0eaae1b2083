"""Tools in chats: what the model is told, calls that are forced, and calls that it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.api.schemas import ChatCompletionRequest
from server.api.tool_parser import Style
from server.api.tools import HERMES, STYLES, style_of, toolbox
from server.engine.grammars import Grammars
from server.errors import BadRequest
from tests import tiny
from tests.server.api.conftest import Clients
from tests.serving import Served, serve

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
}  # fmt: skip
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY},
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
CALL: Any = {
    "id": "call_1", "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "x", "unit": "c"}'},
}  # fmt: skip
TURNS: Any = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
#: A template as Qwen's, which knows tools.
NATIVE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def long_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tiny.llama(max_position_embeddings=2048)
    with serve(tmp_path_factory.mktemp("tools"), model) as served:
        yield served
        served.wait_idle()


@pytest.fixture
def client(long_server: Served, client_of: Clients) -> openai.OpenAI:
    return client_of(long_server)


def bias(server: Served, **factors: float) -> dict[str, float]:
    """`logit_bias` of characters."""
    ids = {char: server.runtime.tokenizer.encode(char)[0] for char in factors}
    return {str(ids[char]): factor for char, factor in factors.items()}


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(ASK | fields)


def messages_of(template: str, **fields: Any) -> Any:
    body = request(**fields)
    box = toolbox(body.tools, body.tool_choice, body.parallel_tool_calls, template)
    return box.prompt([message.to_template() for message in body.messages])


def test_a_template_without_tools_is_told_in_the_style_of_hermes() -> None:
    messages, native = messages_of("{{ messages }}", messages=TURNS, tools=[WEATHER, NOW])
    assert native is None
    system, user, assistant, tool = messages
    assert system["role"] == "system"
    listed = system["content"].split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == [WEATHER, NOW]
    assert user == {"role": "user", "content": "hi"}
    called = assistant["content"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(called) == {
        "name": "get_weather", "arguments": {"city": "x", "unit": "c"},
    }  # fmt: skip
    assert tool["role"] == "user"
    assert tool["content"] == "<tool_response>\nrain\n</tool_response>"


def test_the_system_message_stays_first() -> None:
    turns = [{"role": "system", "content": "Be kind."}, *TURNS]
    messages, _ = messages_of("", messages=turns, tools=[NOW])
    assert messages[0]["content"].startswith("Be kind.\n\n# Tools")
    messages, _ = messages_of("", messages=turns, tools=[NOW], tool_choice="none")
    assert messages[0]["content"] == "Be kind.", "what may not be called is not told"


def test_a_template_with_tools_gets_them() -> None:
    messages, native = messages_of(NATIVE, messages=TURNS, tools=[WEATHER])
    assert native == [WEATHER]
    text = ImmutableSandboxedEnvironment().from_string(NATIVE).render(
        messages=messages, tools=native
    )  # fmt: skip
    assert text.endswith("<user>hi<assistant>[get_weather x]<tool>rain<assistant>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, (HERMES, False)), ("{{ messages }}", (HERMES, False)), (NATIVE, (HERMES, True)),
        ("{% if tools %}[TOOL_CALLS]", (STYLES[1], True)),
        ('{% if tools %}{"name": function name, "parameters": …}', (STYLES[2], True)),
    ],
)  # fmt: skip
def test_the_style_is_read_off_the_template(template: str | None, expected: Any) -> None:
    assert style_of(template) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
    ],
)  # fmt: skip
def test_tools_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        messages_of("", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_forced_calls(client: openai.OpenAI, choice: Any) -> None:
    one: dict[str, Any] = {"parallel_tool_calls": False} if choice == "required" else {}
    for seed in range(5):
        answer = client.chat.completions.create(
            **ASK | {"seed": seed}, tools=[WEATHER, NOW], tool_choice=choice, max_tokens=200, **one
        )
        (found,) = answer.choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        (call,) = found.message.tool_calls or []
        assert call.type == "function"
        assert call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        if choice != "required" or call.function.name == "get_weather":
            assert call.function.name == "get_weather"
            jsonschema.validate(arguments, CITY)
        else:
            assert (call.function.name, arguments) == ("now", {})


def test_required_allows_several_calls(client: openai.OpenAI, long_server: Served) -> None:
    again = bias(long_server, **{"<": 100})  # the model goes on calling as long as it may
    answer = client.chat.completions.create(
        **ASK, tools=[NOW], tool_choice="required", max_tokens=150, logit_bias=again
    )
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) > 1
    assert len({call.id for call in calls}) == len(calls)


def test_streamed_calls(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        **ASK, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False,
        "max_tokens": 200, "n": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    for expected in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == expected.index]
        calls = [call for choice in own for call in choice.delta.tool_calls or []]
        first, *rest = calls
        assert first.function is not None
        assert first.id
        assert (first.type, first.function.name, first.function.arguments) == (
            "function", "get_weather", "",
        )  # fmt: skip
        assert len(rest) > 3, "arguments come in pieces"
        assert all(c.index == 0 and c.id is None and c.function for c in rest)
        text = "".join(c.function.arguments or "" for c in rest if c.function)
        (call,) = expected.message.tool_calls or []
        assert call.type == "function"
        assert text == call.function.arguments
        assert own[-1].finish_reason == "tool_calls"
        assert not any(choice.delta.content for choice in own)


FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "note",
        "schema": {
            "type": "object", "properties": {"note": {"enum": ["a", "b"]}}, "required": ["note"],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("choice", ["none", "auto", "required", NOW])
def test_a_format_and_tools_at_once(
    client: openai.OpenAI, long_server: Served, choice: Any
) -> None:
    """The text has the format, calls have their tool's parameters; with a choice it is one of them,
    whichever the bias on the first token makes likely."""
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": "now"}}
    tools, called, told = [WEATHER, NOW], 0, 0
    for seed, first in [(1, "<"), (2, "{"), (3, "<"), (4, "{")]:
        answer = client.chat.completions.create(
            **ASK | {"seed": seed}, tools=tools, tool_choice=choice, response_format=FORMAT,
            parallel_tool_calls=False, max_tokens=200, logit_bias=bias(long_server, **{first: 50}),  # type: ignore[arg-type]
        )  # fmt: skip
        message = answer.choices[0].message
        for call in message.tool_calls or []:
            called += 1
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, CITY if call.function.name == "get_weather" else {})
            assert answer.choices[0].finish_reason == "tool_calls"
        if message.content is not None:
            told += 1
            jsonschema.validate(json.loads(message.content), FORMAT["json_schema"]["schema"])
            assert answer.choices[0].finish_reason == "stop"
    assert (called, told) == {"none": (0, 4), "auto": (2, 2)}.get(str(choice), (4, 0))


@pytest.mark.parametrize(
    "fields",
    [{"guided_regex": "ab+"}, {"guided_choice": ["abb"]}, {"guided_grammar": 'root ::= "abb"'},
     {"response_format": {"type": "json_object"}}],
)  # fmt: skip
def test_every_constraint_goes_beside_tools(long_server: Served, fields: dict[str, Any]) -> None:
    short = bias(long_server, **{"a": 50, "{": 50, "}": 100})  # it calls nothing, and ends
    body = ASK | {"tools": [NOW], "max_tokens": 100, "logit_bias": short} | fields
    answer = long_server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    if "response_format" in fields:
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert re.fullmatch("ab+", choice["message"]["content"])


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_strict_calls_need_marks_that_begin_them(style: Style) -> None:
    """Where a template writes none, strict tools that need not be called are refused by name."""
    strict = request(tools=[{"type": "function", "function": NOW["function"] | {"strict": True}}])
    template = f"{{% if tools %}}{style.sign}"
    box = toolbox(strict.tools, "auto", True, template)
    followed = Grammars.followed
    if style.begin:
        assert box.constraint(None, followed) is not None
    else:
        with pytest.raises(BadRequest, match="strict needs tool_choice") as caught:
            box.constraint(None, followed)
        assert caught.value.param == "tools"
    forced = toolbox(strict.tools, "required", True, template).constraint(None, followed)
    assert forced is not None


@pytest.mark.parametrize("stream", [False, True])
def test_text_stays_text(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {**ASK, "max_tokens": 30, "temperature": 0}
    plain = client.chat.completions.create(**fields, tools=[NOW], tool_choice="none")
    assert plain.choices[0].message.content
    assert plain.choices[0].message.tool_calls is None
    auto = client.chat.completions.create(**fields, tools=[NOW])
    assert auto.choices[0].finish_reason in ("length", "stop")
    if stream:
        chunks = client.chat.completions.create(**fields, tools=[NOW], stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert text == auto.choices[0].message.content


def test_strict_calls_of_free_choice(client: openai.OpenAI, long_server: Served) -> None:
    """A strict tool's grammar lets text be, and keeps calls to the letter."""
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    answer = client.chat.completions.create(**ASK, tools=[strict], max_tokens=20)
    assert answer.choices[0].message.content is not None
    long_server.wait_idle()


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_that_cannot_be_enforced(long_server: Served, choice: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 2}}}
    function = {"name": "f", "parameters": schema, "strict": True}
    body = ASK | {
        "tools": [NOW, {"type": "function", "function": function}], "tool_choice": choice,
        "max_tokens": 5,
    }  # fmt: skip
    answer = long_server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "tools[1].function.parameters"
    assert "properties.a.multipleOf" in error["message"]
    del function["strict"]
    answer = long_server.http.post("/v1/chat/completions", json=body | {"tool_choice": "auto"})
    assert answer.status_code == 200, "nothing is to be enforced"


def test_a_conversation_with_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **ASK | {"messages": TURNS}, tools=[WEATHER], max_tokens=5
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 300, "the tools are in the prompt"
