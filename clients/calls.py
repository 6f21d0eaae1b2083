"""What can be asked: each call's request, and how its answer is read. Sends nothing.

Both clients send these; what one can do the other can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from clients.adapter_files import (
    CONFIG_NAME,
    HEAD_CONFIG_NAME,
    HEAD_NAME,
    MODEL_CONFIG_NAME,
    AdapterFiles,
    Watched,
)
from clients.errors import (
    ConnectionFailed,
    ConnectionLost,
    InvalidInput,
    TimedOut,
    error_of,
)
from clients.results import Adapter, Classification, Embeddings, Reply

T = TypeVar("T")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and what its answer means.

    Attributes:
        parse: of the answer's body: its JSON, or its text where it is none.
        options: more of httpx's `build_request`.
    """

    method: str
    path: str
    parse: Callable[[Any], T]
    json: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None

    def build(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        return http.build_request(self.method, self.path, json=self.json, **(self.options or {}))

    def read(self, answer: httpx.Response) -> T:
        """Of an answer that was read whole. Raises ApiError where it is a refusal."""
        body = body_of(answer)
        if answer.is_error:
            raise error_of(answer.status_code, body, answer.headers)
        return self.parse(body)


def body_of(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text


@contextmanager
def transport_errors(url: object) -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise ConnectionFailed(f"{url}: no server answers ({_reason(exc)})") from exc
    except httpx.TimeoutException as exc:
        raise TimedOut(f"{url}: no answer in time ({type(exc).__name__})") from exc
    except httpx.TransportError as exc:
        raise ConnectionLost(f"{url}: the connection broke ({_reason(exc)})") from exc


def _reason(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


def server_url(text: str) -> httpx.URL:
    """Raises InvalidInput: it is no address of a server."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as exc:
        raise InvalidInput(f"{text!r} is no URL: {exc}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidInput(f"{text!r} is no URL of a server; write http://HOST:PORT")
    return url


# -- the server ------------------------------------------------------------------------------------


def health() -> Call[dict[str, Any]]:
    return Call("GET", "/health", dict)


def metrics() -> Call[str]:
    return Call("GET", "/metrics", str)


def models() -> Call[list[str]]:
    return Call("GET", "/v1/models", lambda body: [model["id"] for model in body["data"]])


def max_model_len() -> Call[int | None]:
    return Call("GET", "/v1/models", lambda body: body["data"][0].get("max_model_len"))


# -- generation ------------------------------------------------------------------------------------


def complete(prompt: str, model: str, options: Mapping[str, Any]) -> Call[Reply]:
    body = {"model": model, "prompt": prompt, **options}
    return Call("POST", "/v1/completions", _completion, body)


def chat(messages: Sequence[Message], model: str, options: Mapping[str, Any]) -> Call[Reply]:
    body = {"model": model, "messages": list(messages), **options}
    return Call("POST", "/v1/chat/completions", _chat, body)


def streamed(call: Call[Reply]) -> Call[Reply]:
    """The same, to be read event by event. Raises InvalidInput for several choices."""
    assert call.json is not None
    if call.json.get("n") not in (None, 1):
        raise InvalidInput("n: a stream has one choice here; leave n out, or do not stream")
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    return Call(call.method, call.path, call.parse, {**call.json, **extra})


def _completion(body: Mapping[str, Any]) -> Reply:
    choice = body["choices"][0]
    return Reply.of(choice["text"], choice["finish_reason"], body["usage"], body)


def _chat(body: Mapping[str, Any]) -> Reply:
    choice = body["choices"][0]
    text = choice["message"].get("content") or ""
    return Reply.of(text, choice["finish_reason"], body["usage"], body)


# -- classifiers and encoders ----------------------------------------------------------------------


def classify(
    texts: Sequence[str], model: str, options: Mapping[str, Any]
) -> Call[list[Classification]]:
    body = {"model": model, "input": list(texts), **options}
    return Call("POST", "/v1/classify", _classifications, body)


def _classifications(body: Mapping[str, Any]) -> list[Classification]:
    return sorted((Classification.of(row) for row in body["data"]), key=lambda c: c.index)


def embed(texts: Sequence[str], model: str, options: Mapping[str, Any]) -> Call[Embeddings]:
    """Raises InvalidInput for vectors in another form than numbers."""
    if options.get("encoding_format", "float") != "float":
        raise InvalidInput("encoding_format: vectors are read as float here; leave it out")
    body = {"model": model, "input": list(texts), **options}
    return Call("POST", "/v1/embeddings", Embeddings.of, body)


# -- adapters --------------------------------------------------------------------------------------


def _adapter_path(name: str, *parts: str) -> str:
    return "/".join(["/v1/adapters", quote(name, safe=""), *parts])


def list_adapters() -> Call[list[Adapter]]:
    return Call("GET", "/v1/adapters", lambda body: [Adapter.of(item) for item in body["data"]])


def get_adapter(name: str) -> Call[Adapter]:
    return Call("GET", _adapter_path(name), Adapter.of)


def remove_adapter(name: str) -> Call[Adapter]:
    return Call("DELETE", _adapter_path(name), Adapter.of)


def pin_adapter(name: str) -> Call[Adapter]:
    return Call("PUT", _adapter_path(name, "pin"), Adapter.of)


def unpin_adapter(name: str) -> Call[Adapter]:
    return Call("DELETE", _adapter_path(name, "pin"), Adapter.of)


def prefetch_adapter(name: str) -> Call[Adapter]:
    return Call("POST", _adapter_path(name, "prefetch"), Adapter.of)


@contextmanager
def push_adapter(
    name: str, files: AdapterFiles, on_progress: Callable[[int], None] | None
) -> Iterator[Call[Adapter]]:
    """The call, as long as the weights are open; they are read anew each time it is built."""
    with files.weights.open("rb") as file:
        weights = file if on_progress is None else Watched(file, on_progress)
        parts: dict[str, Any] = {
            "config": (CONFIG_NAME, files.config),
            "weights": (files.weights_name, weights),
        }
        if files.model_config is not None:
            parts["id2label"] = (MODEL_CONFIG_NAME, files.model_config)
        if files.head is not None:
            parts["head"] = (HEAD_NAME, files.head.read_bytes())
        if files.head_config is not None:
            parts["head_config"] = (HEAD_CONFIG_NAME, files.head_config)
        yield Call(
            "POST", "/v1/adapters", Adapter.of, options={"data": {"name": name}, "files": parts}
        )
