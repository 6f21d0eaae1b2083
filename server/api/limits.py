"""Bounds a request's head, and its body while it is read: its bytes, and its time. Plain ASGI
middleware."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BodyTooLarge, BodyTooSlow, HeadTooLarge, response_of

#: Where the larger bound holds.
UPLOAD_PATH = "/v1/adapters"
#: Most bytes of a path with its query, and of headers.
MAX_HEAD_BYTES = 32 << 10


class HeadLimit:
    """Refuses a head of more than `MAX_HEAD_BYTES`. uvicorn has read it by then; what does not end
    within 64 KiB it refuses itself, as no HTTP, wherever it has not arrived at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
            num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
            if num_bytes > MAX_HEAD_BYTES:
                await response_of(HeadTooLarge(num_bytes, MAX_HEAD_BYTES))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body as soon as it is announced or read to be over its bound.

    Args:
        max_json: bytes of any body but an upload's.
        max_upload: bytes of an upload's body, all its parts together.
        max_seconds: until a body has arrived as a whole; None waits for ever.
    """

    def __init__(
        self, app: ASGIApp, *, max_json: int, max_upload: int, max_seconds: float | None
    ) -> None:
        self._app = app
        self._max_seconds = max_seconds
        self._max_json = max_json
        self._max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOAD_PATH
        max_bytes = self._max_upload if is_upload else self._max_json
        announced = Headers(scope=scope).get("content-length", "")
        num_announced = int(announced) if announced.isdecimal() else 0
        num_bytes = 0
        ended = False
        loop = asyncio.get_running_loop()
        deadline = None if self._max_seconds is None else loop.time() + self._max_seconds

        async def counting() -> Message:
            nonlocal num_bytes, ended
            if ended:  # what follows is the client's leaving
                return await receive()
            if num_announced > max_bytes:
                raise BodyTooLarge(num_announced, max_bytes)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                assert self._max_seconds is not None
                raise BodyTooSlow(self._max_seconds) from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise BodyTooLarge(num_bytes, max_bytes)
            ended = not message.get("more_body", False)
            return message

        await self._app(scope, counting, send)
