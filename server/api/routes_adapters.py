"""/v1/adapters: upload, look at and delete adapters."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from server.api.responses import Adapter, AdapterList, DeletedAdapter, RegisteredAdapter
from server.api.state import runtime_of
from server.api.upload import UPLOAD_SCHEMA, receive_upload

if TYPE_CHECKING:
    from server.adapters.info import AdapterInfo

router = APIRouter()


@router.post(
    "/v1/adapters",
    response_model=RegisteredAdapter,
    status_code=201,
    responses={200: {"model": RegisteredAdapter, "description": "The same bytes again."}},
    openapi_extra={"requestBody": UPLOAD_SCHEMA},
)
async def register_adapter(request: Request) -> Response:
    """Register an adapter, or let its name stand for other bytes from now on."""
    manager = runtime_of(request).adapters
    async with receive_upload(request) as upload:
        info, outcome = await run_in_threadpool(
            manager.register,
            upload.name,
            upload.config,
            upload.weights,
            upload.id2label,
            head=upload.head,
            head_config=upload.head_config,
        )
    answer = RegisteredAdapter(**_fields(info), status=outcome)
    return JSONResponse(
        answer.model_dump(),
        200 if outcome == "unchanged" else 201,
        {"Location": f"/v1/adapters/{info.name}"},
    )


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> AdapterList:
    adapters = await run_in_threadpool(runtime_of(request).adapters.list)
    return AdapterList(data=[Adapter(**_fields(info)) for info in adapters])


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, request: Request) -> Adapter:
    return Adapter(**_fields(await run_in_threadpool(runtime_of(request).adapters.get, name)))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, request: Request) -> DeletedAdapter:
    """Forget the name. Requests that run keep the adapter until they end."""
    info = await run_in_threadpool(runtime_of(request).adapters.delete, name)
    return DeletedAdapter(**_fields(info))


@router.put("/v1/adapters/{name}/pin")
async def pin_adapter(name: str, request: Request) -> Adapter:
    """Load it, and never evict it, whatever the name stands for; also after a restart."""
    manager = runtime_of(request).adapters
    return Adapter(**_fields(await run_in_threadpool(manager.set_pinned, name, True)))


@router.delete("/v1/adapters/{name}/pin")
async def unpin_adapter(name: str, request: Request) -> Adapter:
    """It stays where it is until others need its place."""
    manager = runtime_of(request).adapters
    return Adapter(**_fields(await run_in_threadpool(manager.set_pinned, name, False)))


@router.post("/v1/adapters/{name}/prefetch", status_code=202)
async def prefetch_adapter(name: str, request: Request) -> Adapter:
    """Begin to load it, before the first request does. Running requests' adapters are not evicted
    for it: where they take all the memory, nothing is loaded."""
    runtime = runtime_of(request)
    info = await run_in_threadpool(runtime.adapters.get, name)
    runtime.prefetch(info.digest)
    return Adapter(**_fields(info))


def _fields(info: AdapterInfo) -> dict[str, Any]:
    labels = None if info.labels is None else list(info.labels)
    return asdict(info) | {"modules": list(info.modules), "labels": labels}
