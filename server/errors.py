"""What the server refuses, and as which HTTP status. The error tree:

    ServerError (500)
    ├── AdapterLoadFailed   500   a registered adapter's files cannot be loaded
    ├── BadRequest          400   a field of the request is wrong
    │   └── ContextTooLong  400   the prompt does not fit the context
    ├── Unauthorized        401   no key, or one that nobody was given
    ├── Forbidden           403   what the server's owner has not allowed
    ├── NotFound            404   no such model or adapter
    ├── Conflict            409   the name is taken or in use
    ├── TooLarge            413   more bytes than a limit or a pool has
    ├── Unprocessable       422   well-formed, and wrong for this base or this mixture
    ├── QueueFull           429   as many requests wait as may
    ├── Unavailable         503   the model is loading, the server drains, the engine has stopped
    └── DeadlineExceeded    504   the answer was not ready in time

`server.api` turns each into an OpenAI error object; nothing below it knows HTTP.
"""

from __future__ import annotations

from typing import ClassVar


class ServerError(Exception):
    """Base of the tree.

    Attributes:
        param: the request's field at fault, or None.
        code: a short machine-readable word, or None.
        retry_after: seconds after which another try may succeed, or None.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


class AdapterLoadFailed(ServerError):
    pass


class BadRequest(ServerError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(BadRequest):
    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens asks for {max_tokens} more, "
            f"but the context length is {max_model_len}",
            param="messages",
            code="context_length_exceeded",
        )


class Unauthorized(ServerError):
    status = 401
    type = "invalid_request_error"


class Forbidden(ServerError):
    status = 403
    type = "invalid_request_error"


class NotFound(ServerError):
    status = 404
    type = "invalid_request_error"


class Conflict(ServerError):
    status = 409
    type = "invalid_request_error"


class TooLarge(ServerError):
    status = 413
    type = "invalid_request_error"


class Unprocessable(ServerError):
    status = 422
    type = "invalid_request_error"


class QueueFull(ServerError):
    status = 429
    type = "rate_limit_error"


class Unavailable(ServerError):
    status = 503


class DeadlineExceeded(ServerError):
    status = 504
    type = "timeout_error"
