"""Tools in a chat: how a model is told of them, and how it writes its calls.

Two styles of calls are known (`STYLES`); which one a model uses is read off its chat template. A
template that knows no tools is told of them in a system message, in the style of Hermes.
Parsing is `server.api.tool_parser`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.fields import Strict, Text
from server.api.tool_parser import Style, ToolCallParser
from server.engine.sequence import Constraint
from server.errors import BadRequest

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Message = Mapping[str, Any]


class Function(Strict):
    """`strict`: calls obey `parameters` to the letter also where the model may choose to call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: ToolName


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


_BARE = ("[TOOL_CALLS]", "<|python_tag|>", "[", "]", ",", ";")
HERMES = Style("hermes", "<tool_call>", "<tool_call>", "</tool_call>", "arguments")
#: The first whose sign is in a template that knows tools.
STYLES = (
    HERMES,
    Style("mistral", "[TOOL_CALLS]", "", "", "arguments", _BARE),
    Style("json", "", "", "", "parameters", _BARE),
)


def style_of(template: str | None) -> tuple[Style, bool]:
    """The style of a chat template, and whether it tells of tools by itself."""
    if template is None or "tools" not in template:
        return HERMES, False
    return next(style for style in STYLES if style.sign in template), True


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request, and how they may be called.

    Attributes:
        tools: empty where none may be called.
        choice: "auto", "required", or a function's name in a tuple.
        parallel: may there be several calls?
    """

    tools: Sequence[Tool]
    choice: Literal["auto", "required"] | tuple[str]
    parallel: bool
    style: Style
    is_native: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends the text where only one call may be made."""
        return (self.style.end,) if self.style.end and self.tools and not self.parallel else ()

    def prompt(self, messages: Sequence[Message]) -> tuple[list[Message], list[Message] | None]:
        """Messages and tools for the chat template."""
        tools: list[Message] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.is_native:
            return list(messages), tools or None
        return _with_tools(messages, tools), None

    def parser(self) -> ToolCallParser:
        """A parser for one answer."""
        return ToolCallParser(self.style, self.names, None if self.parallel else 1)

    def constraint(
        self, content: Constraint | None, followed: Callable[[Constraint], Any]
    ) -> Constraint | None:
        """What an answer must match: where it calls nothing `content`, else calls of the tools.

        Calls are to the letter where the request demands them, where a tool is strict, and beside
        `content`, for a grammar has to know how an answer may go on.

        Args:
            followed: a JSON schema as it is followed; raises BadRequest where it cannot be.
        """
        if not self.tools:
            return content
        if self.choice == "auto" and content is None:
            return self._strict_calls(followed)
        allowed = frozenset(self.choice) if isinstance(self.choice, tuple) else self.names
        form: dict[str, Any] = {
            "type": "tags_with_separator", "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not (self.parallel and self.style.begin),
            "tags": self._tags(allowed, followed),
        }  # fmt: skip
        if self.choice == "auto" and content is not None:
            form = {"type": "or", "elements": [_format(content, followed), form]}
            return _structural(form, content.param)
        return _structural(form, "tools")

    def _strict_calls(self, followed: Callable[[Constraint], Any]) -> Constraint | None:
        """Any text; after the mark of a call, one to the letter. None where no tool is strict."""
        if not any(tool.function.strict for tool in self.tools):
            return None
        if not self.style.begin:
            raise BadRequest(
                "tools: this model's template marks no calls, so strict needs tool_choice "
                "'required' or a function",
                param="tools",
            )
        form = {
            "type": "triggered_tags", "triggers": [self.style.begin],
            "stop_after_first": not self.parallel,
            "tags": self._tags(self.names, followed),
        }  # fmt: skip
        return _structural(form, "tools")

    def _tags(
        self, allowed: frozenset[str], followed: Callable[[Constraint], Any]
    ) -> list[dict[str, Any]]:
        return [
            self._tag(tool, followed, f"tools[{i}].function.parameters")
            for i, tool in enumerate(self.tools)
            if tool.function.name in allowed
        ]

    def _tag(self, tool: Tool, followed: Callable[[Constraint], Any], param: str) -> dict[str, Any]:
        name, schema = json.dumps(tool.function.name), tool.function.parameters
        if schema:
            schema = followed(Constraint("json_schema", json.dumps(schema), param))
        begin, end = self.style.begin, self.style.end
        return {
            "type": "tag",
            "begin": f'{begin and begin + chr(10)}{{"name": {name}, "{self.style.arguments}": ',
            "content": _json(schema or {"type": "object", "additionalProperties": False}),
            "end": f"}}{end and chr(10) + end}",
        }


def _structural(form: dict[str, Any], param: str) -> Constraint:
    source = json.dumps({"type": "structural_tag", "format": form})
    return Constraint("structural_tag", source, param)


def _json(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}


def _format(content: Constraint, followed: Callable[[Constraint], Any]) -> dict[str, Any]:
    """A constraint as a part of a structural tag."""
    match content.kind:
        case "json_schema":
            return _json(followed(content))
        case "regex":
            return {"type": "regex", "pattern": content.source}
        case "grammar":
            return {"type": "grammar", "grammar": content.source}
        case "structural_tag":
            raise ValueError("a structural tag is whole")


def toolbox(
    tools: Sequence[Tool],
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool,
    template: str | None,
) -> Toolbox:
    """Raises BadRequest where `tools` and `tool_choice` contradict each other."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest("tools: two functions have the same name", param="tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise BadRequest(
            f"tool_choice: {choice.function.name!r} is not among the tools", param="tool_choice"
        )
    if choice == "required" and not tools:
        raise BadRequest("tool_choice: 'required' needs tools", param="tool_choice")
    style, is_native = style_of(template)
    if isinstance(choice, NamedTool):  # OpenAI's: exactly one call of it
        return Toolbox(tools, (choice.function.name,), False, style, is_native)
    if choice == "none":
        return Toolbox((), "auto", parallel, style, is_native)
    return Toolbox(tools, choice or "auto", parallel, style, is_native)


_SYSTEM = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def _with_tools(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The conversation for a template that knows only the roles and the text of messages."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    block = _SYSTEM.format(tools="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))
    if plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{block}".lstrip()}
        return [first, *plain[1:]]
    return [{"role": "system", "content": block}, *plain]


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        named = {"name": function["name"], "arguments": function["arguments"]}
        calls.append(f"<tool_call>\n{json.dumps(named, ensure_ascii=False)}\n</tool_call>")
    return {"role": "assistant", "content": "\n".join(filter(None, [message["content"], *calls]))}
