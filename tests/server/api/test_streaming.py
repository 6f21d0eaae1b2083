"""Event streams without a server: whatever happens, events end first and then what they need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from server.api.errors import ClientGone
from server.api.streaming import EventStream, event, unless_gone
from server.errors import Unavailable


class Connection:
    """Both ends of a request: what was sent, and when the client leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def respond(
    events: AsyncGenerator[str, None], log: list[str], connection: Connection
) -> None:
    owned = AsyncExitStack()
    owned.callback(log.append, "released")
    response = EventStream(event("first"), events, owned)
    await response({"type": "http"}, connection.receive, connection.send)


@pytest.mark.parametrize("leave", ["never", "before", "while waiting", "while sending"])
def test_closed_in_order(leave: str) -> None:
    log: list[str] = []

    async def scenario() -> None:
        connection = Connection()

        async def events() -> AsyncGenerator[str, None]:
            try:
                yield event("second")
                if leave == "while waiting":
                    asyncio.get_running_loop().call_later(0.01, connection.left.set)
                    await asyncio.sleep(10)
                if leave == "while sending":
                    connection.left.set()
                yield event("third")
            finally:
                log.append("ended")

        source = events()
        if leave == "before":
            connection.left.set()
        else:
            assert await anext(source) == event("second")
        await respond(source, log, connection)
        assert log[-1] == "released"
        if leave == "never":
            assert connection.text == event("first") + event("third")
            assert connection.sent[-1]["more_body"] is False
        if leave != "before":
            assert log == ["ended", "released"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "told"), [(Unavailable("it stopped"), "it stopped"), (KeyError("secret"), "internal")]
)
def test_a_late_failure_is_the_last_event(error: Exception, told: str) -> None:
    log: list[str] = []

    async def scenario() -> None:
        async def events() -> AsyncGenerator[str, None]:
            yield event("second")
            raise error

        connection = Connection()
        await respond(events(), log, connection)
        last = connection.text.split("\n\n")[-2]
        assert told in last
        assert "secret" not in last
        assert "[DONE]" not in connection.text

    asyncio.run(scenario())
    assert log == ["released"]


def test_work_is_cancelled_and_awaited() -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.01)
            log.append("cleaned up")

    async def scenario() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.01, connection.left.set)
        with pytest.raises(ClientGone):
            await unless_gone(connection.receive, work())
        assert log == ["cleaned up"]

    asyncio.run(scenario())
