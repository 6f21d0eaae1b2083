"""Loading, ready, draining: what the probes and the other paths answer, and how requests end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.serving import Served, listen, serve

LONG: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 480, "ignore_eos": True}


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def test_the_port_is_open_while_the_model_loads(tmp_path: Path) -> None:
    may_load = threading.Event()
    runtime = tiny.runtime(tiny.llama(), tmp_path / "data")

    def load() -> Any:
        may_load.wait(20)
        return runtime

    with listen(load, tiny.settings(tmp_path / "data")) as (_, url), httpx.Client() as http:
        assert http.get(f"{url}/health").json() == {"status": "loading"}
        assert http.get(f"{url}/metrics").status_code == 200
        for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", "/v1/adapters")):
            answer = http.request(method, f"{url}{path}")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "model_loading"
            assert int(answer.headers["retry-after"]) > 0
        may_load.set()
        wait_until(lambda: http.get(f"{url}/ready").status_code == 200)
        assert http.get(f"{url}/ready").json() == {"status": "ready", "model": "tiny"}
        assert http.get(f"{url}/health").json()["status"] == "ok"
        assert http.post(f"{url}/v1/completions", json=LONG).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    def load() -> Any:
        time.sleep(0.5)
        raise ValueError("there is no model")

    with listen(load, tiny.settings(tmp_path)) as (server, url):
        assert httpx.get(f"{url}/ready").status_code == 503
        wait_until(lambda: not server.servers[0].is_serving())
        assert str(server._lifecycle.failure) == "there is no model"


@contextmanager
def stream(server: Served, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The events of a request whose first one has come."""
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        yield lines


def test_draining_lets_requests_finish_and_takes_no_more(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        server.slow_down(0.002)
        with stream(server, LONG) as events, httpx.Client(base_url=server.url) as other:
            server.server.should_exit = True
            wait_until(lambda: other.get("/ready").status_code == 503)
            assert other.get("/health").json()["status"] == "draining"
            assert other.get("/metrics").status_code == 200
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/adapters")):
                answer = other.request(method, path, json=LONG)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "draining"
                assert answer.headers["connection"] == "close"
                assert int(answer.headers["retry-after"]) > 0
            assert list(events)[-1] == "data: [DONE]"


@pytest.mark.parametrize("streamed", [True, False])
def test_what_outlasts_the_drain_timeout_ends_with_an_error(tmp_path: Path, streamed: bool) -> None:
    with serve(tmp_path, drain_timeout=0.1) as server:
        server.slow_down(0.05)
        start = time.monotonic()
        if streamed:
            with stream(server, LONG) as events:
                server.server.should_exit = True
                error = json.loads(list(events)[-1].removeprefix("data: "))["error"]
        else:
            timer = threading.Timer(0.3, lambda: setattr(server.server, "should_exit", True))
            timer.start()
            answer = server.http.post("/v1/completions", json=LONG)
            assert answer.status_code == 503
            error = answer.json()["error"]
        assert "drain_timeout" in error["message"]
        assert error["code"] == "draining"
        assert time.monotonic() - start < 10, "480 steps would take 24 s"
        wait_until(lambda: not server.runtime._thread.is_alive())
        server.runtime.engine.check_integrity()
        assert server.runtime.stats()["kv_blocks_used"] == 0


@pytest.fixture
def process(model_folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command itself, with one request under way."""
    flags = ["--model", str(model_folder), "--data-dir", str(tmp_path / "data"), "--port", "0",
             "--kv-memory", "8MiB", "--adapter-memory", "1MiB", "--quantization", "none",
             "--drain-timeout", "60", "--num-threads", "1",
             "--served-model-name", "tiny"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "server", *flags], stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stderr is not None
            line = next(line for line in started.stderr if "running on" in line)
            url = line.split("running on ")[1].split()[0]
            wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, 60)
            yield started, url
        finally:
            started.kill()


def test_sigterm_drains_and_a_second_one_ends_at_once(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    started, url = process
    body = LONG | {"stream": True, "n": 16, "max_tokens": 500}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert next(lines) is not None
        assert started.poll() is None
        started.send_signal(signal.SIGTERM)
        start = time.monotonic()
        started.wait(20)
        assert time.monotonic() - start < 5
        with pytest.raises(httpx.TransportError):
            list(lines)
