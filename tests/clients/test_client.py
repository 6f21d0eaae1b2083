"""The Python client against a real server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.client import WEIGHTS_NAME, Client
from clients.errors import (
    ApiError,
    BadRequest,
    ConnectionFailed,
    NotFound,
    ServerFailed,
    TooLarge,
    Unprocessable,
    error_of,
)
from tests.serving import Served

HELLO = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_complete(client: Client, server: Served) -> None:
    reply = client.complete("abc", "poet", **GREEDY)
    assert reply.text == server.complete("poet", "abc")
    assert (reply.model, reply.finish_reason) == ("poet", "length")
    assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (3, 12)
    assert "".join(client.stream_complete("abc", "poet", **GREEDY)) == reply.text


def test_the_base_is_the_default_model(client: Client, server: Served) -> None:
    assert client.models() == ["tiny", "poet"]
    assert client.complete("abc", **GREEDY).text == server.complete("tiny", "abc")
    assert client.health()["status"] == "ok"


def test_chat(client: Client) -> None:
    reply = client.chat(HELLO, "poet", **GREEDY)
    assert "".join(client.stream_chat(HELLO, "poet", **GREEDY)) == reply.text
    mixture = client.chat(HELLO, adapters=[{"name": "poet", "weight": 1.0}], **GREEDY)
    assert mixture.text == reply.text


def test_push_takes_the_file_as_adapterhub_names_it(client: Client, server: Served) -> None:
    folder = server.make_adapter("ia3", 3)
    (folder / WEIGHTS_NAME).rename(folder / "adapter.safetensors")
    sent: list[int] = []
    client.adapters.push("renamed", folder, sent.append)
    assert sum(sent) == (folder / "adapter.safetensors").stat().st_size
    client.adapters.remove("renamed")


def test_push_list_show_remove(client: Client, server: Served) -> None:
    folder = server.make_adapter("ia3", 2)
    sent: list[int] = []
    pushed = client.adapters.push("new", folder, sent.append)
    assert (pushed.status, pushed.method) == ("created", "IA3")
    assert sum(sent) == (folder / WEIGHTS_NAME).stat().st_size
    assert client.adapters.push("new", folder).status == "unchanged"
    assert [adapter.name for adapter in client.adapters.list()] == ["new", "poet"]
    assert client.adapters.get("new").digest == pushed.digest
    assert client.adapters.remove("new").name == "new"
    with pytest.raises(NotFound, match="new"):
        client.adapters.get("new")


def test_typed_errors(client: Client, server: Served, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        client.complete("abc", "nobody")
    assert (missing.value.status, missing.value.param) == (404, "model")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequest, match="temperature"):
        client.chat(HELLO, temperature=9)
    with pytest.raises(BadRequest, match="colour"):
        list(client.stream_chat(HELLO, colour="red"))
    folder = server.make_adapter("lora-r4", 3)
    (folder / WEIGHTS_NAME).write_bytes(b"not safetensors")
    with pytest.raises(Unprocessable) as refused:
        client.adapters.push("bad", folder)
    assert refused.value.param == "weights"
    (folder / WEIGHTS_NAME).write_bytes(bytes(5 << 20))
    with pytest.raises(TooLarge, match=str(4 << 20)):
        client.adapters.push("bad", folder)
    with pytest.raises(FileNotFoundError):
        client.adapters.push("bad", tmp_path)
    with pytest.raises(NotFound):
        client.adapters.get("../../health")


def test_leaving_a_stream_ends_the_work(client: Client, server: Served) -> None:
    stream = client.stream_complete("abc", "poet", max_tokens=480, ignore_eos=True)
    next(stream)
    sequences = server.runtime.engine.live
    stream.close()  # type: ignore[attr-defined]
    server.wait_idle()
    assert all(seq.num_output_tokens < 480 for seq in sequences)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.monotonic()
    with (
        Client(f"http://127.0.0.1:{port}") as client,
        pytest.raises(ConnectionFailed, match=str(port)),
    ):
        client.models()
    with Client("127.0.0.1") as client, pytest.raises(ConnectionFailed):
        client.models()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": {"message": "m", "param": "p", "code": "c"}}, BadRequest),
        (409, {"error": {"message": "m"}}, ApiError),
        (502, "<html>bad gateway</html>", ServerFailed),
        (500, {"error": None}, ServerFailed),
        (404, [], NotFound),
    ],
)
def test_errors_of_any_body(status: int, body: Any, kind: type[ApiError]) -> None:
    error = error_of(status, body)
    assert type(error) is kind
    assert error.status == status
    assert str(error)
