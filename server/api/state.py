"""What the routes share, found by the request: the runtime, the metrics, the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.lifecycle import Lifecycle
    from server.runtime import Runtime

#: What needs no key and is answered while the model loads and while the server drains.
PROBES = frozenset({"/health", "/ready", "/metrics"})


def lifecycle_of(request: Request) -> Lifecycle:
    return cast("Lifecycle", request.app.state.lifecycle)


def runtime_of(request: Request) -> Runtime:
    """Raises Unavailable while the model loads."""
    return lifecycle_of(request).runtime


def metrics_of(request: Request) -> Metrics:
    return cast("Metrics", request.app.state.metrics)


def settings_of(request: Request) -> Settings:
    return cast("Settings", request.app.state.settings)
