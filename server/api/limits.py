"""Bounds a request's body while it is read, and counts requests. Plain ASGI middleware."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST, BodyTooLarge
from server.metrics import Metrics

#: Where the larger bound holds.
UPLOAD_PATH = "/v1/adapters"


class BodyLimit:
    """Refuses a body as soon as it is announced or read to be over its bound.

    Args:
        max_json: bytes of any body but an upload's.
        max_upload: bytes of an upload's body, all its parts together.
    """

    def __init__(self, app: ASGIApp, *, max_json: int, max_upload: int) -> None:
        self._app = app
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

        async def counting() -> Message:
            nonlocal num_bytes
            if num_announced > max_bytes:
                raise BodyTooLarge(num_announced, max_bytes)
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise BodyTooLarge(num_bytes, max_bytes)
            return message

        await self._app(scope, counting, send)


class CountRequests:
    """Counts each request with its route's pattern and its status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST
        start = time.perf_counter()

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watching)
        except Exception:
            status = 500
            raise
        finally:
            endpoint = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.request(endpoint, status, time.perf_counter() - start)
