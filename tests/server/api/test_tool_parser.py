"""Tool calls in text: the same pieces however the text is cut."""

from __future__ import annotations

import json
import random

import pytest

from server.api.tool_parser import ArgumentsPiece, CallStart, Piece, Text, ToolCallParser
from server.api.tools import HERMES, STYLES, Style

MISTRAL, JSON = STYLES[1:]
NAMES = frozenset({"get_weather", "now"})


def parse(
    style: Style, pieces: list[str], max_calls: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    parser = ToolCallParser(style, NAMES, max_calls)
    found: list[Piece] = [p for piece in pieces for p in parser.push(piece)]
    found += parser.finish()
    text, calls = "", []
    for piece in found:
        match piece:
            case Text():
                text += piece.text
            case CallStart():
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            case ArgumentsPiece():
                assert piece.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


ONE = '{"name": "get_weather", "arguments": {"city": "a \\"}</tool_call> b", "n": [{}, 1]}}'
ARGUMENTS = '{"city": "a \\"}</tool_call> b", "n": [{}, 1]}'
TURNED = '{"arguments": {"city": "x"}, "name": "now"}'
CASES = [
    (HERMES, "just text", "just text", []),
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [("get_weather", ARGUMENTS)]),
    (HERMES, f"I look. <tool_call>{ONE}</tool_call>", "I look. ", [("get_weather", ARGUMENTS)]),
    (HERMES, f"<tool_call>{ONE}</tool_call>\n<tool_call>\n{TURNED}</tool_call> bye", "bye",
     [("get_weather", ARGUMENTS), ("now", '{"city": "x"}')]),
    (HERMES, f"<tool_call>{ONE}", "", [("get_weather", ARGUMENTS)]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1', "", [("now", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
    (HERMES, "<tool_call>{nonsense}</tool_call>.", "<tool_call>{nonsense}</tool_call>.", []),
    (HERMES, '<tool_call>{"name": "now', '<tool_call>{"name": "now', []),
    (HERMES, ONE, ONE, []),
    (MISTRAL, f'[TOOL_CALLS][{ONE[:-1]}, "id": "abc"}}, {TURNED}]', "",
     [("get_weather", ARGUMENTS), ("now", '{"city": "x"}')]),
    (MISTRAL, f"[{ONE}]", "", [("get_weather", ARGUMENTS)]),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
    (JSON, '{"name": "now", "parameters": {}}', "", [("now", "{}")]),
    (JSON, f' {{"name": "now", "parameters": {{}}}}; {ONE}', "",
     [("now", "{}"), ("get_weather", ARGUMENTS)]),
    (JSON, "<|python_tag|>" + ONE, "", [("get_weather", ARGUMENTS)]),
    (JSON, '{"a": 1}', '{"a": 1}', []),
    (JSON, "  hello { x", "  hello { x", []),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_whole_and_in_pieces(
    style: Style, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(style, [text]) == (content, calls)
    assert parse(style, list(text)) == (content, calls)
    for seed in range(20):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(style, pieces) == (content, calls)


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('<tool_call>{"name": "now", "argu') == []
    assert parser.push('ments": ') == []
    assert parser.push("{") == [CallStart(0, "now"), ArgumentsPiece(0, "{")]
    assert parser.push('"a": "b') == [ArgumentsPiece(0, '"a": "b')]
    assert parser.push('"}}</tool') == [ArgumentsPiece(0, '"}')]
    assert parser.push("_call>") == []
    assert parser.finish() == []


def test_one_call_where_one_is_allowed() -> None:
    text = f"<tool_call>{ONE}</tool_call><tool_call>{TURNED}</tool_call>"
    assert parse(HERMES, [text], max_calls=1) == ("", [("get_weather", ARGUMENTS)])


def test_long_nonsense_takes_linear_time() -> None:
    """A megabyte a token at a time, as a model might ramble."""
    text = '{"x": "' + "a" * 100_000
    parser = ToolCallParser(JSON, NAMES)
    for i in range(0, len(text), 4):
        assert parser.push(text[i : i + 4]) == []
    (piece,) = parser.finish()
    assert isinstance(piece, Text)
    assert piece.text == text
    assert json.dumps(piece.text)
