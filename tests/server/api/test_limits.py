"""What bounds a server's work: the queue, the request's deadline, the body's."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.conftest import Clients
from tests.server.api.test_lifecycle import LONG, stream, wait_until
from tests.serving import Served, serve

TIMEOUT = 0.5
PART = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n'


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, max_num_seqs=2, max_waiting=1) as served:
        yield served
        served.wait_idle()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, request_timeout=TIMEOUT) as served:
        folder = served.make_adapter("lora-r4", 1)
        assert served.push("poet", folder).status_code == 201
        yield served
        served.wait_idle()


def test_a_full_queue_is_429(small: Served, client_of: Clients) -> None:
    small.slow_down(0.01)
    with ThreadPoolExecutor(3) as pool:
        body = LONG | {"max_tokens": 80}
        busy = [pool.submit(small.http.post, "/v1/completions", json=body) for _ in range(3)]
        wait_until(lambda: len(small.runtime.engine.live) == 3)
        answer = small.http.post("/v1/completions", json=LONG | {"max_tokens": 1})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        client = client_of(small)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}], stream=True
            )
        assert small.http.get("/v1/models").status_code == 200, "only generation queues"
        assert [f.result().status_code for f in busy] == [200] * 3
    assert small.http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_a_request_that_finds_room_is_taken_as_a_whole(small: Served) -> None:
    body = LONG | {"prompt": ["abc", "xy"], "n": 8, "max_tokens": 2}
    answer = small.http.post("/v1/completions", json=body)
    assert len(answer.json()["choices"]) == 16


@pytest.mark.parametrize("streamed", [True, False])
def test_a_late_request_is_aborted(hasty: Served, streamed: bool) -> None:
    hasty.slow_down(0.02)
    body = LONG | {"model": "poet", "prompt": ["abc", "xy"], "n": 2}
    start = time.monotonic()
    if streamed:
        with stream(hasty, body) as events:
            error = json.loads(list(events)[-1].removeprefix("data: "))["error"]
    else:
        answer = hasty.http.post("/v1/completions", json=body)
        assert answer.status_code == 504
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
    assert time.monotonic() - start < 5, "480 steps would take 10 s"
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "request_timeout" in error["message"]
    hasty.wait_idle()
    assert hasty.runtime.stats()["kv_blocks_used"] == 0
    assert hasty.http.get("/v1/adapters/poet").json()["num_running"] == 0
    assert hasty.http.delete("/v1/adapters/poet").status_code == 200


def test_a_request_that_waits_too_long_is_aborted(tmp_path: Path) -> None:
    with serve(tmp_path, request_timeout=TIMEOUT, max_num_seqs=1) as server:
        server.slow_down(0.02)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(server.http.post, "/v1/completions", json=LONG) for _ in "ab"]
            assert [f.result().status_code for f in both] == [504, 504]
        server.wait_idle()


def test_the_deadline_holds_though_nobody_reads(hasty: Served) -> None:
    """The engine ends the work, and gives back what it took, of a client that is stuck."""
    hasty.slow_down(0.02)
    host, port = hasty.url.removeprefix("http://").split(":")
    content = json.dumps(LONG | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: hasty.runtime.engine.live)
        hasty.wait_idle(5)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/completions", "application/json"), ("/v1/adapters", "multipart/form-data; boundary=b")],
)
def test_a_body_that_trickles_in_is_408(hasty: Served, path: str, kind: str) -> None:
    def trickle() -> Iterator[bytes]:
        yield (PART if "multipart" in kind else b"{")
        for _ in range(20):
            time.sleep(0.1)
            yield b" "

    started = time.monotonic()
    answer: Any = None
    # It may be answered, and closed, while the client is still writing.
    with httpx.Client(base_url=hasty.url, timeout=20) as http, suppress(httpx.WriteError):
        answer = http.post(path, content=trickle(), headers={"Content-Type": kind})
    assert time.monotonic() - started < 5
    assert answer is None or answer.status_code == 408
    text = hasty.http.get("/metrics").text
    assert f'polypeft_requests_total{{endpoint="{path}",status="408"}} 1.0' in text
