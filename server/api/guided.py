"""What a request may ask its text to match: OpenAI's `response_format`, vLLM's `guided_*`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.api.fields import NonEmpty, Strict, Text
from server.engine.sequence import Constraint
from server.errors import BadRequest

MAX_CHOICES_OF_TEXT = 1024
ANY_OBJECT = '{"type": "object", "additionalProperties": true}'


def _schema_text(value: Any) -> Any:
    """A schema as JSON; it may come as such, or as an object."""
    return json.dumps(value) if isinstance(value, dict | bool) else value


Schema = Annotated[Text, BeforeValidator(_schema_text)]
Texts = Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_CHOICES_OF_TEXT)]


class StructuredOutputs(Strict):
    """vLLM's newer name for all of it."""

    json_: Schema | None = Field(None, alias="json")
    regex: NonEmpty | None = None
    choice: Texts | None = None
    grammar: NonEmpty | None = None
    json_object: Literal[True] | None = None


class Guided(Strict):
    """The fields that both APIs take; at most one of them, with one thing to match."""

    guided_json: Schema | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Texts | None = None
    guided_grammar: NonEmpty | None = Field(None, description="in GBNF; its start is `root`")
    structured_outputs: StructuredOutputs | None = None

    def constraint(self) -> Constraint | None:
        """Raises BadRequest where the fields ask for more than one."""
        found = list(self._constraints())
        if len(found) > 1:
            raise BadRequest(
                f"{found[1].param}: the text matches one thing, and {found[0].param} says another",
                param=found[1].param,
            )
        return found[0] if found else None

    def _constraints(self) -> Iterator[Constraint]:
        yield from _asked(
            "guided_{}", self.guided_json, self.guided_regex, self.guided_choice,
            self.guided_grammar,
        )  # fmt: skip
        asked = self.structured_outputs
        if asked is not None:
            yield from _asked(
                "structured_outputs.{}", asked.json_, asked.regex, asked.choice, asked.grammar
            )
            if asked.json_object:
                yield Constraint("json_schema", ANY_OBJECT, "structured_outputs.json_object")


def _asked(
    param: str,
    schema: str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> Iterator[Constraint]:
    if schema is not None:
        yield Constraint("json_schema", schema, param.format("json"))
    if regex is not None:
        yield Constraint("regex", _checked(regex, param.format("regex")), param.format("regex"))
    if choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
        yield Constraint("grammar", f"root ::= {texts}", param.format("choice"))
    if grammar is not None:
        yield Constraint("grammar", grammar, param.format("grammar"))


def _checked(pattern: str, param: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise BadRequest(f"{param}: not a regular expression: {exc}", param=param) from None
    return pattern


class JsonSchemaFormat(Strict):
    """`strict` changes nothing: the schema is always followed to the letter."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | JsonObject | JsonSchema, Field(discriminator="type")]


def constraint_of(response_format: ResponseFormat | None) -> Constraint | None:
    """What a chat's `response_format` asks for."""
    match response_format:
        case JsonObject():
            return Constraint("json_schema", ANY_OBJECT, "response_format")
        case JsonSchema(json_schema=asked) if asked.schema_ is None:
            return Constraint("json_schema", ANY_OBJECT, "response_format")
        case JsonSchema(json_schema=asked):
            param = "response_format.json_schema.schema"
            return Constraint("json_schema", json.dumps(asked.schema_), param)
        case _:
            return None
