"""Clients of the server's HTTP API, one that waits and one for asyncio. No torch, nothing of ours.

    with Client("http://127.0.0.1:8000") as client:
        client.adapters.push("poet", Path("my-adapter"))
        with client.stream_chat([{"role": "user", "content": "Hello"}], model="poet") as stream:
            for text in stream:
                print(text, end="")

`AsyncClient` has the same methods, to be awaited. All raise `clients.errors.ClientError`:
`ApiError` for what the server refuses, by its status, `ConnectionFailed` where none answers.
`options` are the API's own request fields: temperature, max_tokens, stop,
adapters=[{"name": …, "weight": …}], …
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from clients import calls
from clients.adapter_files import open_adapter
from clients.calls import Call, Message, transport_errors
from clients.errors import error_of
from clients.events import EventReader
from clients.results import Adapter, Classification, Embeddings, Reply
from clients.retries import Retries

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "POLYPEFT_URL"
API_KEY_VARIABLE = "POLYPEFT_API_KEY"

#: Seconds without a byte. A long prompt's first token may be long in coming.
DEFAULT_TIMEOUT = 600.0
CONNECT_TIMEOUT = 10.0

T = TypeVar("T")
Progress = Callable[[int], None]


class _Settings:
    """What both clients are made of; `Client` says what the arguments mean."""

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        timeout: float | httpx.Timeout,
        retries: Retries | None,
    ) -> None:
        self.url = calls.server_url(base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
        self.retries = retries or Retries()
        if not isinstance(timeout, httpx.Timeout):
            timeout = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
        self.timeout = timeout
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        self.headers = {} if not key else {"Authorization": f"Bearer {key}"}


class Stream:
    """One answer as it comes: an iterator over pieces of text.

    It is read within its `with` block only, at whose end the server stops working on it.
    """

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer
        self._reader = EventReader()

    def __iter__(self) -> Iterator[str]:
        """Raises ConnectionLost: it ended early. ServerFailed: the server broke it off."""
        with transport_errors(self._answer.url):
            for data in self._answer.iter_bytes():
                yield from self._reader.feed(data)
        self._reader.close()

    @property
    def reply(self) -> Reply:
        """What came so far; whole, with its counts, after the last piece."""
        return self._reader.reply()


class AsyncStream:
    """`Stream`, to be iterated over with `async for`."""

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer
        self._reader = EventReader()

    async def __aiter__(self) -> AsyncIterator[str]:
        with transport_errors(self._answer.url):
            async for data in self._answer.aiter_bytes():
                for piece in self._reader.feed(data):
                    yield piece
        self._reader.close()

    @property
    def reply(self) -> Reply:
        return self._reader.reply()


class Client:
    """Talks to one server; a context manager that closes its connections.

    Args:
        base_url: by default the environment's POLYPEFT_URL, or `DEFAULT_URL`.
        api_key: sent as a bearer token; by default the environment's POLYPEFT_API_KEY, if any.
        timeout: seconds without a byte after which a request is given up, or httpx's own.
        retries: when a request is sent again.
        transport: httpx's, in place of the network.

    Attributes:
        adapters: the server's adapters.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        made = _Settings(base_url, api_key, timeout, retries)
        self._retries = made.retries
        self._http = httpx.Client(
            base_url=made.url, headers=made.headers, timeout=made.timeout, transport=transport
        )
        self._base: str | None = None
        self.adapters = Adapters(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        return self._send(calls.health())

    def metrics(self) -> str:
        """Prometheus' text; `clients.metrics.Snapshot` reads it."""
        return self._send(calls.metrics())

    def models(self) -> list[str]:
        """The names that requests can use: the base first, then the adapters."""
        return self._send(calls.models())

    def base_model(self) -> str:
        """The base model's name; asked for once."""
        if self._base is None:
            self._base = self.models()[0]
        return self._base

    def max_model_len(self) -> int | None:
        """The longest context in tokens; None from a server that does not tell."""
        return self._send(calls.max_model_len())

    def complete(self, prompt: str, model: str | None = None, **options: Any) -> Reply:
        """Continue a text; by the base model where none is named."""
        return self._send(calls.complete(prompt, model or self.base_model(), options))

    def chat(self, messages: Sequence[Message], model: str | None = None, **options: Any) -> Reply:
        """The assistant's next turn; by the base model where none is named."""
        return self._send(calls.chat(messages, model or self.base_model(), options))

    @contextmanager
    def stream_complete(
        self, prompt: str, model: str | None = None, **options: Any
    ) -> Iterator[Stream]:
        """`complete`, piece by piece."""
        call = calls.complete(prompt, model or self.base_model(), options)
        with self._open(calls.streamed(call)) as stream:
            yield stream

    @contextmanager
    def stream_chat(
        self, messages: Sequence[Message], model: str | None = None, **options: Any
    ) -> Iterator[Stream]:
        """`chat`, piece by piece."""
        call = calls.chat(messages, model or self.base_model(), options)
        with self._open(calls.streamed(call)) as stream:
            yield stream

    def classify(self, texts: Sequence[str], model: str, **options: Any) -> list[Classification]:
        """Each text's class, or its tokens' classes, by an adapter that classifies."""
        return self._send(calls.classify(texts, model, options))

    def embed(self, texts: Sequence[str], model: str | None = None, **options: Any) -> Embeddings:
        """Each text's vector."""
        return self._send(calls.embed(texts, model or self.base_model(), options))

    def _send(self, call: Call[T]) -> T:
        def once() -> T:
            with transport_errors(self._http.base_url):
                return call.read(self._http.send(call.build(self._http)))

        return self._retries.retrying()(once)

    @contextmanager
    def _open(self, call: Call[Reply]) -> Iterator[Stream]:
        answer = self._retries.retrying()(self._begin, call)
        try:
            yield Stream(answer)
        finally:
            answer.close()

    def _begin(self, call: Call[Reply]) -> httpx.Response:
        with transport_errors(self._http.base_url):
            answer = self._http.send(call.build(self._http), stream=True)
            if answer.is_error:
                try:
                    answer.read()
                finally:
                    answer.close()
                raise error_of(answer.status_code, calls.body_of(answer), answer.headers)
        return answer


class Adapters:
    """The server's adapters: `client.adapters`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(self, name: str, path: Path, on_progress: Progress | None = None) -> Adapter:
        """Upload an adapter as PEFT or AdapterHub saved it, or point its name at other weights.

        Args:
            name: what requests will call it.
            path: a folder with adapter_config.json and the weights, a zip of it, or the weights
                with their config beside them; and perhaps the trained model's config.json, whose
                id2label says what a classifier's classes are called.
            on_progress: called with the bytes of the weights that were read to be sent, so far.

        Raises:
            InvalidInput: it does not look like an adapter; nothing was sent.
        """
        with open_adapter(path) as files, calls.push_adapter(name, files, on_progress) as call:
            return self._client._send(call)

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        return self._client._send(calls.list_adapters())

    def get(self, name: str) -> Adapter:
        return self._client._send(calls.get_adapter(name))

    def remove(self, name: str) -> Adapter:
        """Delete the name; requests that run with it finish."""
        return self._client._send(calls.remove_adapter(name))

    def pin(self, name: str) -> Adapter:
        """Keep it on the device: it is never evicted."""
        return self._client._send(calls.pin_adapter(name))

    def unpin(self, name: str) -> Adapter:
        """Let it be evicted again."""
        return self._client._send(calls.unpin_adapter(name))

    def prefetch(self, name: str) -> Adapter:
        """Begin to load it; returns before it is there."""
        return self._client._send(calls.prefetch_adapter(name))


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods, to be awaited."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        made = _Settings(base_url, api_key, timeout, retries)
        self._retries = made.retries
        self._http = httpx.AsyncClient(
            base_url=made.url, headers=made.headers, timeout=made.timeout, transport=transport
        )
        self._base: str | None = None
        self.adapters = AsyncAdapters(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def health(self) -> dict[str, Any]:
        return await self._send(calls.health())

    async def metrics(self) -> str:
        return await self._send(calls.metrics())

    async def models(self) -> list[str]:
        return await self._send(calls.models())

    async def base_model(self) -> str:
        if self._base is None:
            self._base = (await self.models())[0]
        return self._base

    async def max_model_len(self) -> int | None:
        return await self._send(calls.max_model_len())

    async def complete(self, prompt: str, model: str | None = None, **options: Any) -> Reply:
        return await self._send(calls.complete(prompt, model or await self.base_model(), options))

    async def chat(
        self, messages: Sequence[Message], model: str | None = None, **options: Any
    ) -> Reply:
        return await self._send(calls.chat(messages, model or await self.base_model(), options))

    @asynccontextmanager
    async def stream_complete(
        self, prompt: str, model: str | None = None, **options: Any
    ) -> AsyncIterator[AsyncStream]:
        call = calls.complete(prompt, model or await self.base_model(), options)
        async with self._open(calls.streamed(call)) as stream:
            yield stream

    @asynccontextmanager
    async def stream_chat(
        self, messages: Sequence[Message], model: str | None = None, **options: Any
    ) -> AsyncIterator[AsyncStream]:
        call = calls.chat(messages, model or await self.base_model(), options)
        async with self._open(calls.streamed(call)) as stream:
            yield stream

    async def classify(
        self, texts: Sequence[str], model: str, **options: Any
    ) -> list[Classification]:
        return await self._send(calls.classify(texts, model, options))

    async def embed(
        self, texts: Sequence[str], model: str | None = None, **options: Any
    ) -> Embeddings:
        return await self._send(calls.embed(texts, model or await self.base_model(), options))

    async def _send(self, call: Call[T]) -> T:
        async def once() -> T:
            with transport_errors(self._http.base_url):
                return call.read(await self._http.send(call.build(self._http)))

        return await self._retries.async_retrying()(once)

    @asynccontextmanager
    async def _open(self, call: Call[Reply]) -> AsyncIterator[AsyncStream]:
        answer: httpx.Response = await self._retries.async_retrying()(self._begin, call)
        try:
            yield AsyncStream(answer)
        finally:
            await answer.aclose()

    async def _begin(self, call: Call[Reply]) -> httpx.Response:
        with transport_errors(self._http.base_url):
            answer = await self._http.send(call.build(self._http), stream=True)
            if answer.is_error:
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()
                raise error_of(answer.status_code, calls.body_of(answer), answer.headers)
        return answer


class AsyncAdapters:
    """`Adapters`, to be awaited. The files are read between the sends, on the loop's thread."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def push(self, name: str, path: Path, on_progress: Progress | None = None) -> Adapter:
        with open_adapter(path) as files, calls.push_adapter(name, files, on_progress) as call:
            return await self._client._send(call)

    async def list(self) -> list[Adapter]:
        return await self._client._send(calls.list_adapters())

    async def get(self, name: str) -> Adapter:
        return await self._client._send(calls.get_adapter(name))

    async def remove(self, name: str) -> Adapter:
        return await self._client._send(calls.remove_adapter(name))

    async def pin(self, name: str) -> Adapter:
        return await self._client._send(calls.pin_adapter(name))

    async def unpin(self, name: str) -> Adapter:
        return await self._client._send(calls.unpin_adapter(name))

    async def prefetch(self, name: str) -> Adapter:
        return await self._client._send(calls.prefetch_adapter(name))


__all__ = ["DEFAULT_URL", "AsyncClient", "AsyncStream", "Client", "Retries", "Stream"]
