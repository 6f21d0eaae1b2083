"""vLLM's endpoints for adapters, so that what was written for it works here as it is."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from server.api.lora_root import open_adapter
from server.api.schemas import LoadLoraAdapter, UnloadLoraAdapter
from server.api.state import runtime_of, settings_of
from server.errors import BadRequest, Forbidden, NotFound, ServerError

router = APIRouter()


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraAdapter, request: Request) -> PlainTextResponse:
    """Register the adapter in a folder under --lora-root; its files are copied."""
    settings = settings_of(request)
    if settings.lora_root is None:
        raise Forbidden(
            "this server loads no adapters by path: it was started without --lora-root; "
            "POST the files to /v1/adapters",
            param="lora_path",
        )
    root, manager = settings.lora_root, runtime_of(request).adapters

    def register() -> None:
        with open_adapter(root, body.lora_path, body.lora_name, settings.max_upload) as upload:
            manager.register(
                upload.name, upload.config, upload.weights, may_replace=body.load_inplace
            )

    try:
        await run_in_threadpool(manager.check_name, body.lora_name, may_exist=body.load_inplace)
        await run_in_threadpool(register)
    except ServerError as exc:
        exc.param = "lora_name" if exc.param == "name" else exc.param
        if exc.code != "already_exists":
            raise
        raise BadRequest(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True.",
            param="lora_name",
            code=exc.code,
        ) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraAdapter, request: Request) -> PlainTextResponse:
    """Forget a name, as DELETE /v1/adapters/{name} does."""
    try:
        await run_in_threadpool(runtime_of(request).adapters.delete, body.lora_name)
    except NotFound:
        raise NotFound(
            f"The lora adapter '{body.lora_name}' cannot be found.",
            param="lora_name",
            code="model_not_found",
        ) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
