"""A server's life: it loads its model, takes requests, drains, ends.

The port is open from the start to the end, so that probes get an answer and clients a 503 that says
when to come again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import response_of
from server.api.state import PROBES
from server.errors import Unavailable

if TYPE_CHECKING:
    from server.runtime import Runtime

logger = logging.getLogger(__name__)

#: Seconds after which a client may try again: while the model loads; while another server starts.
_RETRY_LOADING = 5
_RETRY_DRAINING = 10
#: How long requests that were ended may take to tell their clients.
_SECONDS_TO_TELL = 5
#: How long a connection may be idle. Longer than clients keep one (httpx and uvicorn: 5), so that
#: no request is sent into a connection that is just being closed.
_SECONDS_IDLE = 75
_POLL_SECONDS = 0.02


class Lifecycle:
    """Where a server is in its life.

    Args:
        load: makes the runtime; runs in a thread of its own.
        drain_timeout: seconds that requests may go on once the server drains.

    Attributes:
        failure: why the model could not be loaded, or None.
        draining: does the server take no more requests?
        num_requests: those under way, probes apart.
    """

    def __init__(self, load: Callable[[], Runtime], *, drain_timeout: float) -> None:
        self._load = load
        self._drain_timeout = drain_timeout
        self._runtime: Runtime | None = None
        self.failure: Exception | None = None
        self.draining = False
        self.num_requests = 0

    @property
    def is_loaded(self) -> bool:
        return self._runtime is not None

    @property
    def runtime(self) -> Runtime:
        """Raises Unavailable while the model loads."""
        if self._runtime is None:
            raise Unavailable(
                "the model is loading", code="model_loading", retry_after=_RETRY_LOADING
            )
        return self._runtime

    def check_ready(self) -> None:
        """Raises Unavailable unless requests are taken."""
        if self.draining:
            raise Unavailable(
                "the server is shutting down", code="draining", retry_after=_RETRY_DRAINING
            )
        self.runtime.check_alive()

    async def start(self) -> None:
        """Load the model and start its engine; a failure is kept."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Runtime] = loop.create_future()

        def finish(runtime: Runtime | None, failure: Exception | None) -> None:
            if loaded.cancelled():  # stopped while it loaded
                if runtime is not None:
                    runtime.close()
            elif runtime is None:
                assert failure is not None
                loaded.set_exception(failure)
            else:
                loaded.set_result(runtime)

        def work() -> None:
            try:
                outcome: tuple[Runtime | None, Exception | None] = (self._load(), None)
            except Exception as exc:
                outcome = None, exc
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, *outcome)

        # A daemon, so that a server that is stopped while it loads ends at once.
        threading.Thread(target=work, name="model-loader", daemon=True).start()
        try:
            runtime = await loaded
        except Exception as exc:
            self.failure = exc
            return
        runtime.start()
        self._runtime = runtime

    async def drain(self, is_over: Callable[[], bool]) -> None:
        """Take no more requests; wait for those under way, then end them with an error.

        Args:
            is_over: asked again and again; true gives up waiting.
        """
        self.draining = True
        if self.num_requests:
            logger.info(
                "draining: %d requests may go on for %g s", self.num_requests, self._drain_timeout
            )
        await self._until_idle(self._drain_timeout, is_over)
        if self.num_requests and not is_over() and self._runtime is not None:
            logger.warning("ending %d requests", self.num_requests)
            self._runtime.abort_all(
                Unavailable(
                    "the server is shutting down, and the request was not finished within "
                    f"drain_timeout, {self._drain_timeout:g} s",
                    code="draining",
                    retry_after=_RETRY_DRAINING,
                )
            )
            await self._until_idle(_SECONDS_TO_TELL, is_over)

    async def _until_idle(self, seconds: float, is_over: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.num_requests and loop.time() < end and not is_over():
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        if self._runtime is not None:
            await run_in_threadpool(self._runtime.close)


class Gate:
    """Counts the requests under way, and refuses those that come while none are taken."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        try:
            self._lifecycle.check_ready()
        except Unavailable as exc:
            response = response_of(exc)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        self._lifecycle.num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.num_requests -= 1


class Server(uvicorn.Server):
    """uvicorn's server, which on a signal drains before it closes its port.

    The first signal lets running requests finish, the second ends at once.
    """

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        # Logging is the program's own; the last timeout is for requests that `drain` has ended.
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_SECONDS_TO_TELL,
            timeout_keep_alive=_SECONDS_IDLE,
        )
        super().__init__(config)
        self._lifecycle: Lifecycle = app.state.lifecycle

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._lifecycle.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._lifecycle.drain(lambda: self.force_exit)
        await super().shutdown(sockets)
