"""Broken and hostile uploads: each is a clear 4xx, leaves nothing behind, and disturbs nobody.

`POLYPEFT_TEST_BROKEN` may name a folder of more broken files (`*.safetensors`); `ok_*` of them are
well-formed containers, of no adapter.
"""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.api.test_upload import BOUNDARY, multipart, num_open_nameless_files, part
from tests.serving import CONFIG, WEIGHTS, Served, serve

#: 3 × 200 variants of a good adapter's two files and of the body.
QUICKLY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Target:
    """A server, a good adapter's bytes, and what the server was like before."""

    def __init__(self, server: Served) -> None:
        self.server = server
        folder = server.make_adapter("lora-r4", 1)
        self.config = json.loads((folder / CONFIG).read_text())
        self.weights = (folder / WEIGHTS).read_bytes()
        assert server.push("good", folder).status_code == 201
        self.answer = server.complete("good", "abc")

    def send(self, config: bytes, weights: bytes) -> httpx.Response:
        files = {"config": (CONFIG, config), "weights": (WEIGHTS, weights)}
        return self.check(self.server.http.post("/v1/adapters", data={"name": "bad"}, files=files))

    def check(self, answer: httpx.Response) -> httpx.Response:
        """A refusal says why; what is taken must have been sound, and is taken out again."""
        if answer.status_code in (200, 201):
            body = {"model": "bad", "prompt": "abc", "max_tokens": 1}
            served = self.server.http.post("/v1/completions", json=body)
            assert served.status_code == 200, served.text
            assert self.server.http.delete("/v1/adapters/bad").status_code == 200
        else:
            assert 400 <= answer.status_code < 500, answer.text
            assert len(answer.json()["error"]["message"]) > 10
            assert self.server.http.get("/v1/adapters/bad").status_code == 404
        return answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Checked at the end: memory and disk are as before; the other adapter answers all along."""
    with serve(tmp_path_factory.mktemp("hostile"), max_upload="4MiB") as server:
        target = Target(server)
        stop = threading.Event()
        wrong: list[str] = []

        def go_on() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as http:
                while not stop.wait(0.05):
                    body = {"model": "good", "prompt": "abc", "temperature": 0, "max_tokens": 12}
                    answer = http.post("/v1/completions", json=body | {"ignore_eos": True})
                    text = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
                    if text != target.answer:
                        wrong.append(text)

        other = threading.Thread(target=go_on)
        other.start()
        num_open = num_open_nameless_files()
        yield target
        stop.set()
        other.join()
        assert wrong == []
        server.wait_idle()
        stats = server.runtime.stats()
        assert stats["adapter_device_bytes"] == server.runtime.adapters.get("good").num_bytes
        folders = list(server.runtime.adapters.store.folder("0" * 64).parent.iterdir())
        assert [folder.name for folder in folders] == [server.runtime.adapters.get("good").digest]
        assert num_open_nameless_files() == num_open


@QUICKLY
@given(seed=st.integers(0, 2**32), choice=st.sampled_from(["header", "length", "bytes", "cut"]))
def test_mutated_weights(target: Target, seed: int, choice: str) -> None:
    chance = random.Random(seed)
    data = bytearray(target.weights)
    (length,) = struct.unpack("<Q", data[:8])
    match choice:
        case "header":  # a value of the header's JSON is another
            header = json.loads(data[8 : 8 + length])
            name = chance.choice([key for key in header if key != "__metadata__"])
            odd: list[Any] = [-1, 0, 1 << 62, 2**64, None, "x", [], {}, [2**40, 2**40], 1.5]
            key = chance.choice(["dtype", "shape", "data_offsets"])
            header[name][key] = chance.choice([*odd, "F8_E4M3", "I64", [0, 0], [8, 4]])
            if chance.random() < 0.2:
                header[name.replace("lora_A", chance.choice(["..", "/etc", "\0", "lora_Q"]))] = {}
            raw = json.dumps(header).encode()
            data = bytearray(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
        case "length":
            data[:8] = struct.pack(
                "<Q", chance.choice([0, 1, length - 1, length + 1, 2**63, 2**32])
            )
        case "bytes":
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(8 + length)] = chance.randrange(256)
        case "cut":
            data = data[: chance.randrange(len(data))]
    target.send(json.dumps(target.config).encode(), bytes(data))


_ODD = [
    None,
    -1,
    0,
    1 << 62,
    1e308,
    "",
    "../..",
    "x" * 10_000,
    [],
    [None],
    {},
    {"a": {}},
    True,
    "\0",
]


@QUICKLY
@given(data=st.data())
def test_mutated_configs(target: Target, data: st.DataObject) -> None:
    config = copy.deepcopy(target.config)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*sorted(config), "surprise"]))
        config[key] = data.draw(st.sampled_from(_ODD))
    raw = json.dumps(config).encode()
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + data.draw(st.binary(min_size=1, max_size=4)) + raw[place + 1 :]
    target.send(raw, target.weights)


@QUICKLY
@given(data=st.data())
def test_mutated_bodies(target: Target, data: st.DataObject) -> None:
    """Multipart bodies with bytes changed, parts in disorder, and odd headers of parts."""
    parts = [
        part("name", None, b"bad"),
        part("config", "c", json.dumps(target.config).encode()),
        part("weights", "w", target.weights),
    ]
    parts = data.draw(st.permutations(parts))
    extra = data.draw(st.sampled_from([b"", part("x" * 300, "y", b""), b"\r\n", b"--", parts[0]]))
    body = bytearray(b"".join([extra, *parts]) + f"--{BOUNDARY}--\r\n".encode())
    for _ in range(data.draw(st.integers(0, 6))):  # most of the structure is at the parts' begins
        start = body.find(b"Content-Disposition", data.draw(st.integers(0, len(body) - 1)))
        place = max(start, 0) + data.draw(st.integers(0, 80))
        body[place % len(body)] = data.draw(st.integers(0, 255))
    answer = target.server.http.post("/v1/adapters", content=bytes(body), headers=multipart())
    if answer.status_code in (200, 201) and answer.json()["name"] != "bad":
        name = answer.json()["name"]
        assert target.server.http.delete(f"/v1/adapters/{name}").status_code == 200
        return
    target.check(answer)


def raw_request(server: Served, head: bytes) -> bytes:
    """What the server answers to these bytes; empty where it only closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1 << 16)
        except OSError:
            return b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n b\r\n\r\n",
    ],
)
def test_heads_that_are_no_http(target: Target, head: bytes) -> None:
    answer = raw_request(target.server, head)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert target.server.http.get("/ready").status_code == 200


@pytest.mark.parametrize("where", ["a header", "many headers", "path", "query"])
def test_a_large_head_is_431(target: Target, where: str) -> None:
    path, headers = "/v1/models", {}
    match where:
        case "a header":
            headers = {"X": "a" * 40_000}
        case "many headers":
            headers = {f"X-{i}": "a" * 400 for i in range(100)}
        case "path":
            path += "/" + "a" * 40_000
        case "query":
            path += "?" + "a" * 40_000
    answer = target.server.http.get(path, headers=headers)
    assert answer.status_code == 431, answer.text
    assert answer.json()["error"]["code"] == "headers_too_large"
    assert "32768 bytes" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]
    headers = {"X": "a" * 30_000}
    assert target.server.http.get("/v1/models", headers=headers).status_code == 200


def test_a_folder_of_broken_files(target: Target) -> None:
    folder = os.environ.get("POLYPEFT_TEST_BROKEN")
    if folder is None:
        pytest.skip("POLYPEFT_TEST_BROKEN is not set")
    files = sorted(Path(folder).rglob("*.safetensors"))
    assert files
    for path in files:
        answer = target.send(json.dumps(target.config).encode(), path.read_bytes())
        assert answer.status_code in (413, 422), path
