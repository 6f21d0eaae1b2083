"""A client that leaves ends its request's work, streaming or not; a dead engine answers 503."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served, serve

MAX_TOKENS = 480


def post(server: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and leave the answer unread."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": ["abc", "xy"], "n": 4}),
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "n": 4}),
    ],
)
def test_leaving_ends_the_work(
    slow_server: Served, path: str, prompt: dict[str, Any], stream: bool
) -> None:
    body = {"model": "poet", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
    connection = post(slow_server, path, body | prompt)
    end = time.monotonic() + 20
    while not any(seq.num_output_tokens for seq in slow_server.runtime.engine.live):
        assert time.monotonic() < end, "the request did not start"
        time.sleep(0.001)
    sequences = slow_server.runtime.engine.live
    if stream:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
    connection.close()
    slow_server.wait_idle()
    assert all(seq.num_output_tokens < MAX_TOKENS for seq in sequences)
    assert slow_server.http.get("/v1/adapters/poet").json()["num_running"] == 0, "the lease is back"


def test_others_go_on_when_one_leaves(server: Served) -> None:
    expected = server.complete("clerk", "abc", max_tokens=200)
    leaving = post(server, "/v1/completions", {"model": "poet", "prompt": "a", "max_tokens": 400})
    staying = {"model": "clerk", "prompt": "abc", "max_tokens": 200, "temperature": 0}
    with server.http.stream(
        "POST", "/v1/completions", json=staying | {"ignore_eos": True, "stream": True}
    ) as stream:
        lines = stream.iter_lines()
        events = [next(lines)]
        leaving.close()
        events += lines
    data = [e.removeprefix("data: ") for e in events if e.startswith("data: {")]
    assert "".join(json.loads(d)["choices"][0]["text"] for d in data) == expected


def test_a_dead_engine_is_unavailable(tmp_path: Path) -> None:
    """Running requests end with an error, later ones get 503, and so does /health."""
    with serve(tmp_path) as server:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 400, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)

            def die() -> None:
                raise SystemExit("killed by the test")

            server.runtime.engine.step = die  # type: ignore[method-assign, assignment]
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        for method, path, content in (("GET", "/health", None), ("POST", "/v1/completions", body)):
            answer = server.http.request(method, path, json=content)
            assert answer.status_code == 503
            assert "stopped" in answer.json()["error"]["message"]


def test_a_failed_step_is_an_error_of_its_requests_only(tmp_path: Path) -> None:
    """The next request is served again."""
    with serve(tmp_path) as server:
        runner = server.runtime.engine.runner
        execute = runner.execute

        def fail_once(batch: Any) -> Any:
            runner.execute = execute  # type: ignore[method-assign]
            raise RuntimeError("killed by the test")

        runner.execute = fail_once  # type: ignore[method-assign]
        answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "abc"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert server.complete("tiny", "abc") == server.expected("abc", [])
        server.wait_idle()


def test_clients_that_come_and_go(tmp_path: Path) -> None:
    """Many requests with more adapters than fit, most of them left: every answer is right, and all
    memory is back."""
    pools = {"max_num_seqs": 8, "kv_memory": "1MiB", "adapter_memory": "64KiB"}
    with serve(tmp_path, **pools) as server:
        names = [f"adapter-{seed}" for seed in range(5)]
        for seed, name in enumerate(names):
            assert server.push(name, server.make_adapter("lora-r4", seed)).status_code == 201
        expected = {name: server.complete(name, "abc") for name in names}

        def visit(seed: int) -> None:
            chance = random.Random(seed)
            name = chance.choice(names)
            if chance.random() < 0.3:
                assert server.complete(name, "abc") == expected[name]
                return
            body = {
                "model": name, "prompt": ["abc" * chance.randint(1, 20)] * chance.randint(1, 3),
                "n": chance.randint(1, 3), "max_tokens": chance.randint(1, 200),
                "stream": chance.random() < 0.5,
            }  # fmt: skip
            with post(server, "/v1/completions", body):
                time.sleep(chance.random() * 0.3)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(visit, range(120)))
        server.wait_idle()
        stats = server.runtime.stats()
        assert stats["kv_blocks_used"] == 0
        assert stats["num_adapter_evictions"] > 0
        adapters = server.http.get("/v1/adapters").json()["data"]
        assert [adapter["num_running"] for adapter in adapters] == [0] * len(names)
