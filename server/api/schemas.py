"""What requests may say: OpenAI's fields, a few of ours, and what is refused by name.

A field that OpenAI defines and that would change the answer here is refused unless it has its
neutral value; a field that nobody knows is refused too. Nothing is silently ignored but labels that
do not concern the answer (`user`, `metadata`, …). `null` means "not given" everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from server.engine.sequence import SamplingParams
from server.errors import BadRequest

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_MIXTURE = 16
MAX_STOPS = 4
MAX_STOP_TOKENS = 64
MIN_TEMPERATURE = 1e-5


def _invalid(message: str) -> PydanticCustomError:
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


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """One or several prompts, each a text or a list of token ids."""
    if isinstance(value, str) or _is_token_ids(value):
        prompts = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        raise _invalid("a string, a list of strings, token ids, or lists of token ids expected")
    if len(prompts) > MAX_PROMPTS:
        raise _invalid(f"{len(prompts)} prompts, and at most {MAX_PROMPTS} are taken")
    if not (all(isinstance(p, str) for p in prompts) or all(map(_is_token_ids, prompts))):
        raise _invalid("the prompts must all be strings, or all be lists of token ids")
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_unicode(prompt)
        if not prompt:
            raise _invalid("a prompt is empty")
    return prompts


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair; no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid("the text holds a lone surrogate, which is no Unicode character") from None
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _join_parts(value: Any) -> Any:
    """Content as parts becomes one text, the parts' texts one after another."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _invalid(f"only text parts are supported, not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise _invalid("a text part needs the string 'text'")
        texts.append(part["text"])
    return "".join(texts)


Text = Annotated[str, AfterValidator(_check_unicode)]
NonEmpty = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class Message(Strict):
    """One turn of a conversation. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_parts)]
    name: str | None = None
    refusal: Annotated[Any, Refused()] = None
    annotations: Annotated[Any, Refused([])] = None
    tool_calls: Annotated[Any, Refused([])] = None
    function_call: Annotated[Any, Refused()] = None
    audio: Annotated[Any, Refused()] = None

    def to_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class WeightedAdapter(Strict):
    """One part of a mixture."""

    name: NonEmpty
    weight: float = 1.0


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, Refused(False)] = None


class LoadLoraAdapter(Strict):
    """POST /v1/load_lora_adapter, in vLLM's words."""

    lora_name: NonEmpty
    lora_path: NonEmpty
    load_inplace: bool = False

    base_model_name: Annotated[Any, Refused()] = None
    is_3d_lora_weight: Annotated[Any, Refused(False)] = None


class UnloadLoraAdapter(Strict):
    """POST /v1/unload_lora_adapter, in vLLM's words. Names are enough here: the id is not read."""

    lora_name: NonEmpty
    lora_int_id: int | None = None


class GenerationRequest(Strict):
    """What completions and chat have in common."""

    model: NonEmpty
    adapters: list[WeightedAdapter] | None = Field(None, min_length=1, max_length=MAX_MIXTURE)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 keep all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: Annotated[list[NonEmpty], BeforeValidator(_as_list)] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False

    # Labels that do not concern the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    logit_bias: Annotated[Any, Refused({})] = None

    def mixture(self) -> list[tuple[str, float]] | None:
        if self.adapters is None:
            return None
        return [(part.name, part.weight) for part in self.adapters]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
        """Check what the fields say together; raises BadRequest naming the field."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest(
                "stream_options: allowed only with stream: true", param="stream_options"
            )
        if self.min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens: {self.min_tokens} is over max_tokens, {max_tokens}",
                param="min_tokens",
            )
        check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            # Anything this close to zero is greedy; dividing by it would overflow.
            temperature=self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompts)] = Field(
        json_schema_extra={"description": "text, texts, token ids, or lists of token ids"}
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    best_of: Annotated[Any, Refused(1)] = None
    echo: Annotated[Any, Refused(False)] = None
    suffix: Annotated[Any, Refused("")] = None

    def sampling(self, vocab_size: int) -> SamplingParams:
        return self._sampling(self.max_tokens or 16, self.logprobs, vocab_size)


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    # Labels that do not concern the answer.
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused("none", "auto")] = None
    functions: Annotated[Any, Refused([])] = None
    modalities: Annotated[Any, Refused(["text"])] = None
    moderation: Annotated[Any, Refused()] = None
    prediction: Annotated[Any, Refused()] = None
    reasoning_effort: Annotated[Any, Refused("none")] = None
    response_format: Annotated[Any, Refused({"type": "text"})] = None
    tool_choice: Annotated[Any, Refused("none", "auto")] = None
    tools: Annotated[Any, Refused([])] = None
    verbosity: Annotated[Any, Refused("medium")] = None
    web_search_options: Annotated[Any, Refused()] = None

    def sampling(self, room: int, vocab_size: int) -> SamplingParams:
        """Args: room: the tokens that the context has left; the default of max_tokens."""
        given = self.max_completion_tokens or self.max_tokens
        if self.max_tokens is not None and self.max_tokens != given:
            raise BadRequest(
                "max_tokens: differs from max_completion_tokens, which replaces it",
                param="max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(given or max(1, room), logprobs, vocab_size)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises BadRequest for an id that the model does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(
                f"{param}: no token has the id {token_id}; the vocabulary has {vocab_size}",
                param=param,
            )
