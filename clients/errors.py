"""What a client raises:

ClientError
├── InvalidInput          refused here, before anything was sent; a ValueError too
├── ConnectionFailed      no server answered; nothing was sent
├── ConnectionLost        the connection broke, or a stream ended early
├── TimedOut              a connection, and no answer in time
└── ApiError              the server refused     (.status, .param, .code, .request_id, .retry_after)
    ├── BadRequest        400
    ├── Unauthorized      401
    ├── Forbidden         403
    ├── NotFound          404
    ├── Conflict          409
    ├── TooLarge          413
    ├── Unprocessable     422
    ├── RateLimited       429
    └── ServerFailed      500 and above, or a stream that broke off with an error
        └── Unavailable   503
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clients.retry_after import seconds_of

#: Longest part of an answer that is no error object which a message quotes, in characters.
_MAX_QUOTED = 200


class ClientError(Exception):
    """Base of the tree."""


class InvalidInput(ClientError, ValueError):
    """Refused here, before anything was sent."""


class ConnectionFailed(ClientError):
    """No server answered; nothing was sent."""


class ConnectionLost(ClientError):
    """The connection broke, or a stream ended early; the server may have done the work."""


class TimedOut(ClientError):
    """The server did not answer in time; it may still do the work."""


class ApiError(ClientError):
    """The server refused a request.

    Attributes:
        status: the HTTP status.
        param: the field at fault, or None.
        code: a short machine-readable word, or None.
        request_id: what the server's log calls the request, or None.
        retry_after: seconds after which the server asks to try again, or None.
    """

    def __init__(
        self,
        message: str,
        status: int,
        param: str | None = None,
        code: str | None = None,
        *,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequest(ApiError):
    """A field of the request is wrong."""


class Unauthorized(ApiError):
    """The server wants an API key, or another one."""


class Forbidden(ApiError):
    """The API key does not allow this."""


class NotFound(ApiError):
    """No such model or adapter, or a server without this endpoint."""


class Conflict(ApiError):
    """Not in the state that things are in now."""


class TooLarge(ApiError):
    """More bytes than the server takes."""


class Unprocessable(ApiError):
    """An adapter that does not fit the base model, or a mixture that does not add up."""


class RateLimited(ApiError):
    """Too many requests; nothing of this one was done."""


class ServerFailed(ApiError):
    """The server's own failure."""


class Unavailable(ServerFailed):
    """The server takes no requests now."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Unprocessable,
    429: RateLimited,
    503: Unavailable,
}


def error_of(status: int, body: Any, headers: Mapping[str, str] | None = None) -> ApiError:
    """The error for an answer.

    Args:
        body: its parsed JSON, or its text.
        headers: the answer's, by names that differ in no case (as httpx has them).
    """
    headers = headers or {}
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        detail = {"message": f"HTTP {status}: {str(body)[:_MAX_QUOTED]}"}
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else ApiError)
    return kind(
        str(detail.get("message") or f"HTTP {status}"),
        status,
        detail.get("param"),
        detail.get("code"),
        request_id=headers.get("x-request-id"),
        retry_after=seconds_of(headers.get("retry-after")),
    )


__all__ = [
    "ApiError",
    "BadRequest",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "Forbidden",
    "InvalidInput",
    "NotFound",
    "RateLimited",
    "ServerFailed",
    "TimedOut",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "Unprocessable",
    "error_of",
]
