"""/health, /ready and /metrics: for those who run the server. None needs a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.responses import Readiness
from server.api.state import lifecycle_of, metrics_of, runtime_of
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Is the process alive? Also while the model loads and while the server drains; 503 with the
    reason when the engine has stopped, which only a new process mends."""
    lifecycle = lifecycle_of(request)
    if not lifecycle.is_loaded:
        return {"status": "loading"}
    return lifecycle.runtime.status() | ({"status": "draining"} if lifecycle.draining else {})


@router.get("/ready")
async def ready(request: Request) -> Readiness:
    """May requests be sent here? 503 while the model loads, while the server drains, and when the
    engine has stopped."""
    lifecycle_of(request).check_ready()
    return Readiness(status="ready", model=runtime_of(request).base_name)


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
async def metrics(request: Request) -> Response:
    registry, lifecycle = metrics_of(request), lifecycle_of(request)
    if lifecycle.is_loaded:
        registry.update(lifecycle.runtime.stats())
        registry.update_adapters(lifecycle.runtime.adapter_usage())
    return Response(registry.render(), media_type=CONTENT_TYPE)
