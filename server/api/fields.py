"""What the fields of requests are made of: strict models, refusals by name, Unicode text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from server.errors import BadRequest


def invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{message}", {"message": message})


class Refused:
    """Marks a field of OpenAI's that is not served: it may only have one of its neutral values."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if any(type(value) is type(n) and value == n for n in self.neutral):
            return value
        allowed = "".join(f" or send {value!r}" for value in self.neutral)
        message = {"message": f"not supported by this server; leave it out{allowed}"}
        raise PydanticCustomError("unsupported", "{message}", message)


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN; null is as good as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


def check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair; no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid("the text holds a lone surrogate, which is no Unicode character") from None
    return text


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class TextsOrTokens:
    """Reads one or several of `noun`, each a text or a list of token ids; at most `max_count`."""

    noun: str
    max_count: int

    def __call__(self, value: Any) -> list[str | list[int]]:
        if isinstance(value, str) or _is_token_ids(value):
            found = [value]
        elif isinstance(value, list) and value:
            found = value
        else:
            raise invalid("a string, a list of strings, token ids, or lists of token ids expected")
        if len(found) > self.max_count:
            raise invalid(f"{len(found)} {self.noun}s, and at most {self.max_count} are taken")
        if not (all(isinstance(one, str) for one in found) or all(map(_is_token_ids, found))):
            raise invalid(f"the {self.noun}s must all be strings, or all be lists of token ids")
        for one in found:
            if isinstance(one, str):
                check_unicode(one)
            if not one:
                raise invalid(f"one {self.noun} is empty")
        return found


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


Text = Annotated[str, AfterValidator(check_unicode)]
NonEmpty = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises BadRequest for an id that the model does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(
                f"{param}: no token has the id {token_id}; the vocabulary has {vocab_size}",
                param=param,
            )
