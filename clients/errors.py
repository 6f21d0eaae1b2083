"""What a client raises:

ClientError
├── ConnectionFailed     no server answered, or the connection broke
└── ApiError             the server refused        (.status, .param, .code)
    ├── BadRequest       400
    ├── NotFound         404
    ├── TooLarge         413
    ├── Unprocessable    422
    └── ServerFailed     500 and above, or a stream that broke off with an error
"""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """Base of the tree."""


class ConnectionFailed(ClientError):
    """No server answered, or the connection broke."""


class ApiError(ClientError):
    """The server refused a request.

    Attributes:
        status: the HTTP status.
        param: the field at fault, or None.
        code: a short machine-readable word, or None.
    """

    def __init__(
        self, message: str, status: int, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


class BadRequest(ApiError):
    """A field of the request is wrong."""


class NotFound(ApiError):
    """No such model or adapter."""


class TooLarge(ApiError):
    """More bytes than the server takes."""


class Unprocessable(ApiError):
    """An adapter that does not fit the base model, or a mixture that does not add up."""


class ServerFailed(ApiError):
    """The server's own failure."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    404: NotFound,
    413: TooLarge,
    422: Unprocessable,
}


def error_of(status: int, body: Any) -> ApiError:
    """The error for an answer; `body` is its parsed JSON, or its text."""
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        detail = {"message": f"HTTP {status}: {str(body)[:200]}"}
    kind = ServerFailed if status >= 500 else _BY_STATUS.get(status, ApiError)
    message = str(detail.get("message") or f"HTTP {status}")
    return kind(message, status, detail.get("param"), detail.get("code"))


__all__ = [
    "ApiError",
    "BadRequest",
    "ClientError",
    "ConnectionFailed",
    "NotFound",
    "ServerFailed",
    "TooLarge",
    "Unprocessable",
    "error_of",
]
