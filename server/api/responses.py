"""What answers say, in OpenAI's words. Fields that are not set are left out of chunks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token; offsets count characters of the tokens before it.

    The first token of a prompt has no probability: null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer of /v1/completions, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """`arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """The first of a call has its id and its name, those after it pieces of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A chunk of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Tokens(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    prompt: str


class Model(BaseModel):
    """The base (`parent` is null) or an adapter, whose `root` pins its present content."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "polypeft"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Adapter(BaseModel):
    """What an adapter is, where it is resident, and how often it was used."""

    object: Literal["adapter"] = "adapter"
    name: str
    digest: str
    method: str
    rank: int
    num_bytes: int
    file_bytes: int
    num_virtual_tokens: int
    modules: list[str]
    created_at: float
    updated_at: float
    num_requests: int
    last_used_at: float | None
    pinned: bool
    tier: Literal["device", "host", "disk"]
    residency: Literal["device", "host", "disk", "loading"]
    num_running: int
    task: str
    labels: list[str] | None
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    )


class RegisteredAdapter(Adapter):
    status: Literal["created", "unchanged", "updated"]


class DeletedAdapter(Adapter):
    deleted: Literal[True] = True


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]


class Readiness(BaseModel):
    status: Literal["ready"]
    model: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail
