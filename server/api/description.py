"""The OpenAPI description: what FastAPI cannot know of errors, streams and keys."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from server.api.responses import Error

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """Error objects with these statuses."""
    return {
        status: {"model": Error, "description": HTTPStatus(status).phrase} for status in statuses
    }


#: What any request may be answered, whatever its path.
COMMON = refusals(400, 401, 408, 413, 431, 500, 503)
#: What a request that names an adapter may be answered.
NAMED = refusals(404)
#: What a request that registers or changes an adapter may be answered.
CHANGES = refusals(404, 409, 422)
#: What a request that is pooled may be answered.
POOLS = refusals(404, 422, 429, 504)
#: What a request that generates may be answered.
GENERATES: Responses = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **refusals(404, 422, 429, 504),
}

_ERROR = "#/components/schemas/Error"
#: Schemas of FastAPI's own errors.
_GENERATED = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI, *, needs_key: bool) -> None:
    """Make `app.openapi` tell the truth: no error has FastAPI's own form here."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        description = generate()
        for path in description["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                if "HTTPValidationError" in str(responses.get("422")):
                    del responses["422"]
                for status, response in responses.items():
                    if int(status) >= 400:  # whatever the answer's own media type
                        response["content"] = {"application/json": {"schema": {"$ref": _ERROR}}}
        components = description["components"]
        for name in _GENERATED:
            components["schemas"].pop(name, None)
        if needs_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            description["security"] = [{"key": []}]
        app.openapi_schema = description
        return description

    app.openapi = openapi  # type: ignore[method-assign]
