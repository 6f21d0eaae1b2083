"""A small synchronous client of the server's HTTP API. Needs httpx and nothing of ours.

client = Client("http://127.0.0.1:8000")
client.adapters.push("poet", Path("my-adapter"))
for text in client.stream_chat([{"role": "user", "content": "Hello"}], model="poet"):
    print(text, end="")
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

import httpx

from clients.errors import ConnectionFailed, error_of

DEFAULT_URL = "http://127.0.0.1:8000"

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MODEL_CONFIG_NAME = "config.json"
HUB_WEIGHTS_NAME = "adapter.safetensors"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Adapter:
    """What the server says of an adapter. Sizes in bytes, times in seconds since the epoch.

    Attributes:
        digest: its identity; a name can be flipped to another.
        num_bytes, file_bytes: on the device, and in its files.
        residency: "device", "host", "disk" or "loading".
        status: only after a push: "created", "updated" or "unchanged".
    """

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
    residency: str
    num_running: int
    status: str | None = None


@dataclass(frozen=True)
class Reply:
    """A finished answer."""

    text: str
    model: str
    finish_reason: str | None
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


class Client:
    """Talks to one server; a context manager that closes its connections.

    Every method raises `clients.errors.ApiError` for what the server refuses and
    `ConnectionFailed` where no server answers. `options` are the API's own request fields:
    temperature, max_tokens, top_p, stop, seed, adapters=[{"name": …, "weight": …}], …
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 600.0
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=httpx.Timeout(timeout, connect=10.0)
        )
        self._base: str | None = None
        self.adapters = Adapters(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        return self._json("GET", "/health")

    def models(self) -> list[str]:
        """The names that requests can use: the base first, then the adapters."""
        return [model["id"] for model in self._json("GET", "/v1/models")["data"]]

    def base_model(self) -> str:
        """The base model's name; asked for once."""
        if self._base is None:
            self._base = self.models()[0]
        return self._base

    def complete(self, prompt: str, model: str | None = None, **options: Any) -> Reply:
        """Continue a text; by the base model where none is named."""
        body = {"model": model or self.base_model(), "prompt": prompt, **options}
        answer = self._json("POST", "/v1/completions", json=body)
        return _reply(answer, answer["choices"][0]["text"])

    def chat(self, messages: Sequence[Message], model: str | None = None, **options: Any) -> Reply:
        """The assistant's next turn; by the base model where none is named."""
        body = {"model": model or self.base_model(), "messages": list(messages), **options}
        answer = self._json("POST", "/v1/chat/completions", json=body)
        return _reply(answer, answer["choices"][0]["message"]["content"])

    def stream_complete(
        self, prompt: str, model: str | None = None, **options: Any
    ) -> Iterator[str]:
        """`complete`, piece by piece. Closing the iterator stops the server's work."""
        body = {"model": model or self.base_model(), "prompt": prompt, "stream": True, **options}
        for chunk in self._events("/v1/completions", body):
            yield from (choice["text"] for choice in chunk["choices"] if choice["text"])

    def stream_chat(
        self, messages: Sequence[Message], model: str | None = None, **options: Any
    ) -> Iterator[str]:
        """`chat`, piece by piece. Closing the iterator stops the server's work."""
        head = {"model": model or self.base_model(), "messages": list(messages), "stream": True}
        for chunk in self._events("/v1/chat/completions", head | options):
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        with self._connection_errors():
            answer = self._http.request(method, path, **kwargs)
        body = _parse(answer)
        if answer.is_error:
            raise error_of(answer.status_code, body)
        return body

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with (
            self._connection_errors(),
            self._http.stream("POST", path, json=body) as answer,
        ):
            if answer.is_error:
                answer.read()
                raise error_of(answer.status_code, _parse(answer))
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise error_of(500, chunk)
                yield chunk
        raise ConnectionFailed("the stream ended early")

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as exc:
            reason = str(exc) or type(exc).__name__
            raise ConnectionFailed(f"{self._http.base_url}: {reason}") from exc


class Adapters:
    """The server's adapters: `client.adapters`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(
        self, name: str, folder: Path, on_progress: Callable[[int], None] | None = None
    ) -> Adapter:
        """Upload an adapter as PEFT or AdapterHub saved it, or point its name at other weights.

        Args:
            name: what requests will call it.
            folder: holds adapter_config.json and adapter_model.safetensors, or AdapterHub's
                adapter.safetensors; and perhaps the trained model's config.json, whose id2label
                says what a classifier's classes are called.
            on_progress: called with the bytes of the weights that were sent since the last call.

        Raises:
            FileNotFoundError: one of the two files is missing.
        """
        path = weights_path(folder)
        with open(folder / CONFIG_NAME, "rb") as config, open(path, "rb") as file:
            weights = file if on_progress is None else _Watched(file, on_progress)
            files: dict[str, Any] = {
                "config": (CONFIG_NAME, config),
                "weights": (path.name, weights),
            }
            model_config = folder / MODEL_CONFIG_NAME
            if model_config.is_file():
                files["id2label"] = (MODEL_CONFIG_NAME, model_config.read_bytes())
            answer = self._client._json("POST", "/v1/adapters", data={"name": name}, files=files)
        return _adapter(answer)

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        return [_adapter(item) for item in self._client._json("GET", "/v1/adapters")["data"]]

    def get(self, name: str) -> Adapter:
        return _adapter(self._client._json("GET", f"/v1/adapters/{quote(name, safe='')}"))

    def remove(self, name: str) -> Adapter:
        """Delete the name; requests that run with it finish."""
        return _adapter(self._client._json("DELETE", f"/v1/adapters/{quote(name, safe='')}"))


def weights_path(folder: Path) -> Path:
    """Where PEFT would have saved an adapter's weights, or AdapterHub has."""
    saved_by_hub = folder / HUB_WEIGHTS_NAME
    return saved_by_hub if saved_by_hub.is_file() else folder / WEIGHTS_NAME


class _Watched:
    """A binary file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], on_progress: Callable[[int], None]) -> None:
        self._file = file
        self._on_progress = on_progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_progress(len(data))
        return data

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _parse(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text


def _adapter(body: Mapping[str, Any]) -> Adapter:
    """Fields that a newer server adds are passed over."""
    return Adapter(**{f.name: body[f.name] for f in fields(Adapter) if f.name in body})


def _reply(answer: Mapping[str, Any], text: str) -> Reply:
    usage = answer["usage"]
    return Reply(
        text=text,
        model=answer["model"],
        finish_reason=answer["choices"][0]["finish_reason"],
        num_prompt_tokens=usage["prompt_tokens"],
        num_completion_tokens=usage["completion_tokens"],
        num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )
