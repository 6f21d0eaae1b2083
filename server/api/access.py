"""One log line and one count for each request, and the id by which a client finds it again."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST, response_of
from server.api.state import PROBES
from server.logs import request_id
from server.metrics import Metrics

logger = logging.getLogger("server.access")

#: A client's own id is taken if it is this; otherwise one is made.
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_MAX_LOGGED_PATH = 200


@dataclass
class RequestRecord:
    """What a request's log line says of it; its route fills it in."""

    adapter: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None


_record: ContextVar[RequestRecord] = ContextVar("request_record")


def current_record() -> RequestRecord:
    """Of the request that this task answers; outside of one, a record that nobody reads."""
    return _record.get(None) or RequestRecord()


class Access:
    """Names each request, counts it by its route's pattern, and logs how it ended."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(name)
        record = RequestRecord()
        _record.set(record)
        status = CLIENT_CLOSED_REQUEST
        start = time.perf_counter()

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self._app(scope, receive, watching)
        except Exception as exc:  # a defect of the server: told here, where the id is known
            logger.exception("a request failed")
            if status == CLIENT_CLOSED_REQUEST:
                await response_of(exc)(scope, receive, watching)
            status = 500
        finally:
            seconds = time.perf_counter() - start
            endpoint = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.request(endpoint, status, seconds)
            self._log(scope, status, seconds, record)

    def _log(self, scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if not logger.isEnabledFor(level):
            return
        # As it was sent, percent-encoded: a path may spell line breaks.
        path = scope.get("raw_path", b"").decode("latin-1")[:_MAX_LOGGED_PATH]
        fields = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 6),
            "adapter": record.adapter,
            "prompt_tokens": record.num_prompt_tokens,
            "output_tokens": record.num_output_tokens,
        }
        present = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, "request", extra={"fields": present})
