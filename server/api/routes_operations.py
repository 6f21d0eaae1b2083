"""/health and /metrics: for those who run the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.state import metrics_of, runtime_of
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 while the engine runs, 503 with the reason when it has stopped."""
    return runtime_of(request).status()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    registry = metrics_of(request)
    registry.update(runtime_of(request).stats())
    return Response(registry.render(), media_type=CONTENT_TYPE)
