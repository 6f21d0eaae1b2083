"""What requests may say: OpenAI's fields, a few of ours, and what is refused by name.

A field that OpenAI defines and that would change the answer here is refused unless it has its
neutral value; a field that nobody knows is refused too. Nothing is silently ignored but labels that
do not concern the answer (`user`, `metadata`, …). `null` means "not given" everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.fields import (
    NonEmpty,
    Refused,
    Strict,
    Text,
    TextsOrTokens,
    TokenId,
    as_list,
    check_token_ids,
    invalid,
)
from server.api.guided import Guided, ResponseFormat, constraint_of
from server.api.tools import NamedTool, Tool
from server.engine.sequence import Constraint, SamplingParams
from server.errors import BadRequest

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_MIXTURE = 16
MAX_STOPS = 4
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_TOOLS = 128
MIN_TEMPERATURE = 1e-5

Prompts = Annotated[list[str | list[int]], PlainValidator(TextsOrTokens("prompt", MAX_PROMPTS))]


def _join_parts(value: Any) -> Any:
    """Content as parts becomes one text, the parts' texts one after another."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise invalid(f"only text parts are supported, not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise invalid("a text part needs the string 'text'")
        texts.append(part["text"])
    return "".join(texts)


class FunctionCall(Strict):
    name: NonEmpty
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise invalid("must be a JSON object, as a string")
        return value


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: NonEmpty
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One turn of a conversation. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: NonEmpty | None = Field(None, validate_default=True)
    content: Annotated[Text | None, BeforeValidator(_join_parts)] = Field(
        None, validate_default=True
    )
    name: str | None = None
    refusal: Annotated[Any, Refused()] = None
    annotations: Annotated[Any, Refused([])] = None
    function_call: Annotated[Any, Refused()] = None
    audio: Annotated[Any, Refused()] = None

    @field_validator("tool_calls")
    @classmethod
    def _calls_of_an_assistant(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise invalid("only an assistant's message has tool calls")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _id_of_a_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("role") == "tool"):
            raise invalid("a message of a tool needs it, and no other has it")
        return value

    @field_validator("content")
    @classmethod
    def _content_unless_calls(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "required")
        return value

    def to_template(self) -> dict[str, Any]:
        """As chat templates take it: a call's arguments are an object."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.name is not None and self.role == "tool":
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


def _parse_bias(value: Any) -> list[tuple[int, float]]:
    """`{"token id": bias}` as pairs."""
    if not isinstance(value, dict):
        raise invalid("an object of token ids and numbers expected")
    if len(value) > MAX_BIASES:
        raise invalid(f"{len(value)} entries, and at most {MAX_BIASES} are taken")
    pairs = []
    for key, bias in value.items():
        if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,9}", key):
            raise invalid(f"{str(key)[:50]!r} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise invalid(f"the bias of {key} must be a number between -100 and 100")
        pairs.append((int(key), float(bias)))
    return pairs


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


class GenerationRequest(Guided):
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
    stop: Annotated[list[NonEmpty], BeforeValidator(as_list)] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False

    # Labels that do not concern the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    logit_bias: Annotated[list[tuple[int, float]], PlainValidator(_parse_bias)] = Field(
        [], json_schema_extra={"description": "token ids, as strings, and -100 to 100"}
    )

    # vLLM's, with the values that say what is done here anyway.
    allowed_token_ids: Annotated[Any, Refused()] = None
    bad_words: Annotated[Any, Refused([])] = None
    include_stop_str_in_output: Annotated[Any, Refused(False)] = None
    length_penalty: Annotated[Any, Refused(1.0, 1)] = None
    prompt_logprobs: Annotated[Any, Refused()] = None
    skip_special_tokens: Annotated[Any, Refused(True)] = None
    spaces_between_special_tokens: Annotated[Any, Refused(True)] = None
    truncate_prompt_tokens: Annotated[Any, Refused()] = None
    use_beam_search: Annotated[Any, Refused(False)] = None

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
        check_token_ids([token for token, _ in self.logit_bias], vocab_size, "logit_bias")
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
            logit_bias=tuple(self.logit_bias),
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts = Field(
        json_schema_extra={"description": "text, texts, token ids, or lists of token ids"}
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    max_tokens: int | None = Field(None, ge=0, description="0 only with echo")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool = False

    suffix: Annotated[Any, Refused("")] = None
    add_special_tokens: Annotated[Any, Refused(True)] = None  # vLLM's

    @property
    def num_candidates(self) -> int:
        """Choices of each prompt that are generated; the best `n` are given."""
        return self.best_of or self.n

    def sampling(self, vocab_size: int) -> SamplingParams:
        """Raises BadRequest naming the field."""
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens: 0 needs echo: true", param="max_tokens")
        if self.num_candidates < self.n:
            raise BadRequest(f"best_of: {self.best_of} is fewer than n, {self.n}", param="best_of")
        if self.num_candidates > self.n and self.stream:
            raise BadRequest("best_of: not with stream: true", param="best_of")
        ranked = 0 if self.num_candidates > self.n else None
        logprobs = ranked if self.logprobs is None else self.logprobs
        params = self._sampling(max_tokens, logprobs, vocab_size)
        return replace(params, prompt_logprobs=self.logprobs if self.echo else None)


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

    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused("none", "auto")] = None
    functions: Annotated[Any, Refused([])] = None
    modalities: Annotated[Any, Refused(["text"])] = None
    moderation: Annotated[Any, Refused()] = None
    prediction: Annotated[Any, Refused()] = None
    reasoning_effort: Annotated[Any, Refused("none")] = None
    verbosity: Annotated[Any, Refused("medium")] = None
    web_search_options: Annotated[Any, Refused()] = None

    # vLLM's.
    add_generation_prompt: Annotated[Any, Refused(True)] = None
    add_special_tokens: Annotated[Any, Refused(False)] = None
    chat_template: Annotated[Any, Refused()] = None
    chat_template_kwargs: Annotated[Any, Refused({})] = None
    continue_final_message: Annotated[Any, Refused(False)] = None
    documents: Annotated[Any, Refused([])] = None
    echo: Annotated[Any, Refused(False)] = None

    def _constraints(self) -> Iterator[Constraint]:
        asked = constraint_of(self.response_format)
        if asked is not None:
            yield asked
        yield from super()._constraints()

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


class TokenizeRequest(Strict):
    """POST /tokenize. `add_special_tokens`: by default for a prompt, and not for messages."""

    model: NonEmpty | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("prompt: either it or messages is needed", param="prompt")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: NonEmpty | None = None
    tokens: list[TokenId]
