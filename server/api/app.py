"""The HTTP application around a runtime. HTTP lives in this package only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING

from fastapi import FastAPI

from server.api import (
    description,
    errors,
    routes_adapters,
    routes_chat,
    routes_completions,
    routes_models,
    routes_operations,
    routes_pooling,
    routes_tokens,
    routes_vllm,
)
from server.api.access import Access
from server.api.keys import KeyRing, RequireKey
from server.api.lifecycle import Gate, Lifecycle
from server.api.limits import BodyLimit, HeadLimit
from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from server.runtime import Runtime

logger = logging.getLogger(__name__)

#: Most bytes of a JSON body; far over any context.
MAX_JSON_BYTES = 8 << 20


#: Each module of routes, and the refusals that its own add to those of any path.
_ROUTES: tuple[tuple[ModuleType, description.Responses], ...] = (
    (routes_models, description.NAMED),
    (routes_completions, description.GENERATES),
    (routes_chat, description.GENERATES),
    (routes_pooling, description.POOLS),
    (routes_adapters, description.CHANGES),
    (routes_vllm, description.CHANGES | description.refusals(403)),
    (routes_tokens, description.NAMED),
    (routes_operations, {}),
)


def create_app(
    load: Callable[[], Runtime], settings: Settings, ring: KeyRing | None = None
) -> FastAPI:
    """The application. While it starts up it begins to load the runtime, in a thread; it is up, and
    answers 503, before that is done. It closes the runtime when it ends.

    Args:
        load: makes the runtime, which is not started. What it raises is in `lifecycle.failure`.
        ring: the keys that requests must bear, or None.
    """
    lifecycle = Lifecycle(load, drain_timeout=settings.drain_timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(lifecycle.start())
        try:
            yield
        finally:
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            await lifecycle.close()

    app = FastAPI(
        title="polypeft",
        version="1",
        description="Many adapters of several methods on one quantized base model.",
        lifespan=lifespan,
        responses=description.COMMON,
    )
    app.state.lifecycle = lifecycle
    app.state.metrics = Metrics()
    app.state.settings = settings
    errors.install(app)
    # The last one added is the first that a request meets.
    app.add_middleware(
        BodyLimit,
        max_json=MAX_JSON_BYTES,
        max_upload=settings.max_upload,
        max_seconds=settings.request_timeout,
    )
    if ring is not None:
        app.add_middleware(RequireKey, ring=ring)
    app.add_middleware(Gate, lifecycle=lifecycle)
    app.add_middleware(HeadLimit)
    app.add_middleware(Access, metrics=app.state.metrics)
    description.install(app, needs_key=ring is not None)
    for module, responses in _ROUTES:
        app.include_router(module.router, responses=responses)
    return app
