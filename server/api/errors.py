"""Every error becomes an OpenAI error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.errors import DeadlineExceeded, ServerError, Unauthorized

logger = logging.getLogger(__name__)

#: Status of a request whose client left before the answer (nginx's number); nobody receives it.
CLIENT_CLOSED_REQUEST = 499

_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "unsupported": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


class ClientGone(Exception):
    """The client left; there is nobody to answer."""


class BodyTooLarge(HTTPException):
    """More bytes than this endpoint reads. An HTTPException, because FastAPI lets those through."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(
            413, f"the body has at least {num_bytes} bytes, over the limit of {max_bytes} bytes"
        )


class HeadTooLarge(HTTPException):
    """A longer head than this server reads."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(
            431, f"path and headers have {num_bytes} bytes, over the limit of {max_bytes} bytes"
        )


class BodyTooSlow(HTTPException):
    """A body that did not arrive in time; an HTTPException for the same reason."""

    def __init__(self, max_seconds: float) -> None:
        super().__init__(
            408, f"the body has not arrived within {max_seconds:g} s, the request_timeout"
        )


def error_body(
    message: str, type: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    fields = {"message": message, "type": type, "param": param, "code": code}
    # What a client sent may be quoted, and JSON can spell what UTF-8 cannot.
    return {"error": {k: v and v.encode(errors="replace").decode() for k, v in fields.items()}}


def body_of(exc: Exception) -> tuple[int, dict[str, Any]]:
    """Status and error object of any exception; what is not ours says nothing of its inside."""
    match exc:
        case ServerError():
            return exc.status, error_body(exc.message, exc.type, exc.param, exc.code)
        case BodyTooLarge():
            return 413, error_body(exc.detail, "invalid_request_error", None, "request_too_large")
        case HeadTooLarge():
            return 431, error_body(exc.detail, "invalid_request_error", None, "headers_too_large")
        case BodyTooSlow():
            return 408, error_body(exc.detail, "timeout_error", None, "request_timeout")
        case HTTPException():
            kind = "server_error" if exc.status_code >= 500 else "invalid_request_error"
            return exc.status_code, error_body(str(exc.detail), kind)
        case RequestValidationError():
            return 400, _validation_body(exc.errors())
        case _:
            return 500, error_body(
                "internal error; the server's log has the details", "server_error"
            )


def _validation_body(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first error, preferring one that names a field nobody knows."""
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    kind, code = first["type"], _CODES.get(first["type"], "invalid_value")
    param = _param(first["loc"])
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return error_body(
            f"the body is not valid JSON: {reason}", "invalid_request_error", None, code
        )
    if param is None:
        message = "the body must be a JSON object, sent with 'Content-Type: application/json'"
    elif kind == "extra_forbidden":
        message = f"{param}: no such field"
    elif kind == "missing":
        message = f"{param}: required"
    else:
        message = f"{param}: {first['msg']}"
    return error_body(message, "invalid_request_error", param, code)


def _param(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def response_of(exc: Exception) -> JSONResponse:
    """The answer to any exception, with the headers that tell a client when to come again."""
    status, body = body_of(exc)
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    match exc:
        case ServerError(retry_after=int(seconds)):
            headers["Retry-After"] = str(seconds)
        case Unauthorized():
            headers["WWW-Authenticate"] = "Bearer"
        case DeadlineExceeded():  # OpenAI's clients would try it again, to the same end
            headers["X-Should-Retry"] = "false"
    return JSONResponse(body, status, headers)


async def _respond(request: Request, exc: Exception) -> Response:
    response = response_of(exc)
    if isinstance(exc, HTTPException) and exc.status_code in (404, 405):  # from routing
        message = f"there is no {request.method} {request.url.path}"
        body = error_body(message, "invalid_request_error")
        return JSONResponse(body, exc.status_code, exc.headers)
    return response


async def _nobody(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def install(app: FastAPI) -> None:
    """Register the handlers. What nobody expected is `access`'s to answer and to log."""
    for kind in (ServerError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _respond)
    for gone in (ClientGone, ClientDisconnect):
        app.add_exception_handler(gone, _nobody)
