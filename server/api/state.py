"""What the routes share: the runtime and the metrics, found by the request."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from server.metrics import Metrics

if TYPE_CHECKING:
    from server.runtime import Runtime


def runtime_of(request: Request) -> Runtime:
    return cast("Runtime", request.app.state.runtime)


def metrics_of(request: Request) -> Metrics:
    return cast("Metrics", request.app.state.metrics)
