"""What is sent again and when, over a transport that a test writes; real waits, short ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from clients.client import AsyncClient, Client, Retries
from clients.errors import (
    ApiError,
    BadRequest,
    ClientError,
    Conflict,
    ConnectionFailed,
    ConnectionLost,
    Forbidden,
    NotFound,
    RateLimited,
    ServerFailed,
    TimedOut,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    error_of,
)
from clients.retry_after import seconds_of

QUICK = Retries(max_retries=2, first_wait=0.01)
MODELS = httpx.Response(200, json={"data": [{"id": "base"}]})


class Script:
    """Answers, or errors to raise, one after another; the last one again and again."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = answers
        self.requests: list[httpx.Request] = []
        self.times: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        self.times.append(time.monotonic())
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def client(self, retries: Retries = QUICK) -> Client:
        return Client("http://server", retries=retries, transport=httpx.MockTransport(self))


def refusal(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(
        status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        json={"error": {"message": "no", "type": "t", "param": "p", "code": "c"}},
    )


@pytest.mark.parametrize(
    "first", [refusal(429), refusal(503), httpx.ConnectError("refused"), httpx.ConnectTimeout("")]
)
def test_what_the_server_did_nothing_of_is_sent_again(first: httpx.Response | Exception) -> None:
    script = Script(first, first, MODELS)
    assert script.client().models() == ["base"]
    assert len(script.requests) == 3
    again = Script(first, first, MODELS)

    async def work() -> list[str]:
        transport = httpx.MockTransport(again)
        async with AsyncClient("http://server", retries=QUICK, transport=transport) as client:
            return await client.models()

    assert asyncio.run(work()) == ["base"]
    assert len(again.requests) == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refusal(400), BadRequest),
        (refusal(401), Unauthorized),
        (refusal(409), Conflict),
        (refusal(500), ServerFailed),
        (httpx.ReadTimeout("slow"), TimedOut),
        (httpx.ReadError("reset"), ConnectionLost),
        (httpx.RemoteProtocolError("gone"), ConnectionLost),
    ],
)
def test_what_it_may_have_done_is_not(
    answer: httpx.Response | Exception, error: type[ClientError]
) -> None:
    script = Script(answer, MODELS)
    with pytest.raises(error):
        script.client().models()
    assert len(script.requests) == 1


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_the_last_error_is_raised(max_retries: int) -> None:
    script = Script(refusal(429))
    with pytest.raises(RateLimited, match="no"):
        script.client(Retries(max_retries, first_wait=0.001)).models()
    assert len(script.requests) == max_retries + 1


def test_retry_after_is_waited_for() -> None:
    script = Script(refusal(429, retry_after="1"), MODELS)
    script.client().models()
    assert 1.0 <= script.times[1] - script.times[0] < 2.0
    soon = datetime.now(UTC) + timedelta(seconds=2)
    script = Script(refusal(503, retry_after=format_datetime(soon, usegmt=True)), MODELS)
    script.client().models()
    assert 0.5 < script.times[1] - script.times[0] <= 2.1
    script = Script(refusal(503, retry_after="0"), MODELS)
    script.client(Retries(first_wait=30)).models()


def test_a_wait_that_is_too_long_is_the_callers_to_decide() -> None:
    script = Script(refusal(429, retry_after="61", x_request_id="r-1"), MODELS)
    with pytest.raises(RateLimited) as refused:
        script.client().models()
    assert (refused.value.retry_after, refused.value.request_id) == (61, "r-1")
    assert len(script.requests) == 1


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7),
        (" 0 ", 0),
        ("Fri, 02 Jan 2026 03:04:35 GMT", 30),
        ("Fri, 02 Jan 2026 03:04:35 -0000", 30),
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert seconds_of(value, NOW) == seconds


# -- streams ---------------------------------------------------------------------------------------


def chunk(text: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return httpx.Request("POST", "http://x", json={"choices": [choice], "model": "m"}).content


def events(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


def test_a_stream_is_opened_again_and_never_continued() -> None:
    whole = httpx.Response(200, content=events(chunk("a"), chunk("b", "stop"), b"[DONE]"))
    script = Script(refusal(503), whole)
    with script.client().stream_complete("p", "m") as stream:
        assert list(stream) == ["a", "b"]
    assert len(script.requests) == 2
    broken = Script(httpx.Response(200, content=events(chunk("a"))), whole)
    with (
        broken.client().stream_complete("p", "m") as stream,
        pytest.raises(ConnectionLost, match="ended early"),
    ):
        list(stream)
    assert stream.reply.text == "a"
    assert len(broken.requests) == 1


def test_a_stream_that_the_server_breaks_off() -> None:
    failed = b'{"error": {"message": "the engine has stopped", "code": null}}'
    script = Script(httpx.Response(200, content=events(chunk("a"), failed)))
    with (
        script.client().stream_complete("p", "m") as stream,
        pytest.raises(ServerFailed, match="has stopped"),
    ):
        list(stream)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_are_cut_at_line_feeds_only(size: int, end: bytes) -> None:
    """A line separator or a form feed may be a part of the text, and keep-alives come between."""
    text = "one\u2028two\x85three\x0cé"
    body = (b": ping\n\n" + events(chunk(text), chunk("!", "stop"), b"[DONE]")).replace(b"\n", end)

    def pieces(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=_cut(body, size))

    client = Client("http://server", transport=httpx.MockTransport(pieces))
    with client.stream_complete("p", "m") as stream:
        assert list(stream) == [text, "!"]


def _cut(body: bytes, size: int) -> Iterator[bytes]:
    return (body[i : i + size] for i in range(0, len(body), size))


def test_several_choices_are_not_streamed() -> None:
    script = Script(MODELS)
    with pytest.raises(ValueError, match="n: "), script.client().stream_complete("p", "m", n=2):
        pass
    assert not script.requests


def test_an_upload_is_sent_whole_again(tmp_path: Path) -> None:
    save_file({"w": torch.arange(9.0)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = {
        "name": "a", "digest": "d", "method": "LORA", "rank": 1, "num_bytes": 1, "file_bytes": 1,
        "num_virtual_tokens": 0, "modules": [], "created_at": 0.0, "updated_at": 0.0,
        "num_requests": 0, "last_used_at": None, "residency": "disk", "num_running": 0,
        "status": "created", "a_newer_field": 1,
    }  # fmt: skip
    script = Script(refusal(503), httpx.Response(201, json=adapter))
    sent: list[int] = []
    assert script.client().adapters.push("a", tmp_path, sent.append).status == "created"
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert len(script.requests) == 2
    assert all(weights in request.content for request in script.requests)
    assert sent[-1] == len(weights)


# -- what is sent, and errors ----------------------------------------------------------------------


def test_the_key_is_the_argument_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*arguments: Any) -> str | None:
        script = Script(MODELS)
        transport = httpx.MockTransport(script)
        Client("http://server", *arguments, transport=transport).models()
        return script.requests[0].headers.get("authorization")

    monkeypatch.delenv("POLYPEFT_API_KEY", raising=False)
    assert key() is None
    monkeypatch.setenv("POLYPEFT_API_KEY", "from-the-environment")
    assert key() == "Bearer from-the-environment"
    assert key("given") == "Bearer given"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": {"message": "m", "param": "p", "code": "c"}}, BadRequest),
        (401, {"error": {"message": "m"}}, Unauthorized),
        (403, {"error": {"message": "m"}}, Forbidden),
        (404, [], NotFound),
        (409, {"error": {"message": "m"}}, Conflict),
        (413, {}, TooLarge),
        (418, {}, ApiError),
        (422, {"detail": "m"}, Unprocessable),
        (429, "slow down", RateLimited),
        (500, {"error": None}, ServerFailed),
        (502, "<html>bad gateway</html>", ServerFailed),
        (503, None, Unavailable),
    ],
)
def test_errors_of_any_body(status: int, body: Any, kind: type[ApiError]) -> None:
    error = error_of(status, body)
    assert type(error) is kind
    assert error.status == status
    assert str(error)


def test_a_connection_error_names_the_server() -> None:
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(ConnectionFailed, match=r"http://server.*refused"):
        script.client().models()
