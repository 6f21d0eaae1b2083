"""GET /v1/models: the base and its adapters, as models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from server.api.responses import Model, ModelList
from server.api.state import runtime_of

if TYPE_CHECKING:
    from server.adapters.info import AdapterInfo
    from server.runtime import Runtime

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    runtime = runtime_of(request)
    adapters = await run_in_threadpool(runtime.adapters.list)
    return ModelList(data=[_base(runtime), *(_adapter(runtime, info) for info in adapters)])


# A path, because a base's name may hold slashes: "organisation/model".
@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> Model:
    runtime = runtime_of(request)
    if model == runtime.base_name:
        return _base(runtime)
    return _adapter(runtime, await run_in_threadpool(runtime.adapters.get, model))


def _base(runtime: Runtime) -> Model:
    return Model(
        id=runtime.base_name,
        created=runtime.created,
        root=runtime.base_name,
        parent=None,
        max_model_len=runtime.max_model_len,
    )


def _adapter(runtime: Runtime, info: AdapterInfo) -> Model:
    return Model(
        id=info.name,
        created=int(info.created_at),
        root=f"{info.name}@sha256:{info.digest}",
        parent=runtime.base_name,
        max_model_len=runtime.max_model_len - info.num_virtual_tokens,
    )
