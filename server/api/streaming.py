"""Server-sent events, and work that ends when its client leaves. Knows nothing of tokens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ClientGone, body_of
from server.errors import ServerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; when the client leaves first, cancel it and wait for its end.

    Args:
        receive: the request's, its body already read.

    Raises:
        ClientGone: the client left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: str) -> str:
    """One event; JSON has no line breaks."""
    return f"data: {data}\n\n"


class EventStream(Response):
    """Sends events as they come, and stops making them when the client leaves.

    Starlette's own streaming response leaves its iterator for the garbage collector to close; this
    one closes it, and then what it was made of, before it returns.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None], owned: AsyncExitStack) -> None:
        """
        Args:
            first: the first event, awaited before there is a response, so that what is refused
                still gets its own status.
            rest: the events after it.
            owned: closed after the events, however they end.
        """
        self.status_code = 200
        self.background = None
        self._first = first
        self._rest = rest
        self._owned = owned
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._owned, aclosing(self._rest):
            with suppress(ClientGone):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        item: str | None = self._first
        while item is not None:
            body = {"type": "http.response.body", "body": item.encode(), "more_body": True}
            await send(body)
            item = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> str | None:
        """The next event, or None. A failure can only be told as an event now; it is the last."""
        try:
            return await anext(self._rest, None)
        except Exception as exc:
            if not isinstance(exc, ServerError):
                logger.exception("a stream failed")
            return event(json.dumps(body_of(exc)[1]))
