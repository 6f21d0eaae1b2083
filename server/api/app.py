"""The HTTP application around a runtime. HTTP lives in this package only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from server.api import (
    errors,
    routes_adapters,
    routes_chat,
    routes_completions,
    routes_models,
    routes_operations,
)
from server.api.limits import BodyLimit, CountRequests
from server.api.responses import Error
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.runtime import Runtime

#: Most bytes of a JSON body; far over any context.
MAX_JSON_BYTES = 8 << 20


def create_app(runtime: Runtime) -> FastAPI:
    """The application; it starts the runtime when it starts and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime.start()
        try:
            yield
        finally:
            await run_in_threadpool(runtime.close)

    app = FastAPI(
        title="polypeft",
        version="1",
        description="Many adapters of several methods on one quantized base model.",
        lifespan=lifespan,
        responses={"default": {"model": Error, "description": "An OpenAI error object."}},
    )
    app.state.runtime = runtime
    app.state.metrics = Metrics()
    errors.install(app)
    app.add_middleware(BodyLimit, max_json=MAX_JSON_BYTES, max_upload=runtime.max_upload)
    app.add_middleware(CountRequests, metrics=app.state.metrics)
    for module in (
        routes_models,
        routes_completions,
        routes_chat,
        routes_adapters,
        routes_operations,
    ):
        app.include_router(module.router)
    return app
