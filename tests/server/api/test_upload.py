"""Uploads over HTTP: what they answer, and that refused and broken ones leave nothing behind."""

from __future__ import annotations

import copy
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from peftcore import BottleneckConfig, get_peft_model
from tests.serving import CONFIG, WEIGHTS, Served

BOUNDARY = "boundary"


@pytest.fixture(autouse=True)
def nothing_left_behind(server: Served) -> Iterator[None]:
    """Each test removes what it registered; then no file, row, lease or block is left of it."""
    before = {a["name"] for a in server.http.get("/v1/adapters").json()["data"]}
    num_open = num_open_nameless_files()
    num_files = len(list(server.runtime.adapters.store.folder("0" * 64).parent.iterdir()))
    yield
    after = {a["name"] for a in server.http.get("/v1/adapters").json()["data"]}
    for name in after - before:
        assert server.http.delete(f"/v1/adapters/{name}").status_code == 200
    server.wait_idle()
    assert len(list(server.runtime.adapters.store.folder("0" * 64).parent.iterdir())) == num_files
    wait_until(lambda: num_open_nameless_files() == num_open)


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def num_open_nameless_files() -> int:
    """Spooled parts that are still open (Linux can tell)."""
    if sys.platform != "linux":
        return 0
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # closed in between
            continue
    return sum("/#" in link and link.endswith("(deleted)") for link in links)


def test_created_unchanged_updated(server: Served) -> None:
    first, second = server.make_adapter("lora-r4", 11), server.make_adapter("lora-r4", 12)
    created = server.push("new", first)
    assert created.status_code == 201
    assert created.headers["location"] == "/v1/adapters/new"
    info = created.json()
    assert info["status"] == "created"
    assert (info["name"], info["method"], info["rank"]) == ("new", "LORA", 4)
    assert info["num_bytes"] > 0
    assert info["file_bytes"] == sum((first / f).stat().st_size for f in (CONFIG, WEIGHTS))
    assert "model.layers.0.mlp.down_proj" in info["modules"]

    again = server.push("new", first)
    assert (again.status_code, again.json()["status"]) == (200, "unchanged")
    assert again.json()["digest"] == info["digest"]

    updated = server.push("new", second)
    assert (updated.status_code, updated.json()["status"]) == (201, "updated")
    assert updated.json()["digest"] != info["digest"]
    assert server.complete("new", "abc") == server.expected("abc", [(second, 1.0)])


def test_adapterhubs_files_are_taken(server: Served) -> None:
    """Under the same two fields; and its refusals name its keys."""
    torch.manual_seed(17)
    config = BottleneckConfig.preset("par_bn", init_weights="houlsby", name="theirs")
    model = get_peft_model(copy.deepcopy(server.model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    folder = server.folder / "adapterhub"
    model.save_pretrained(folder)
    weights = (folder / "adapter.safetensors").read_bytes()
    info = server.push("new", folder, weights=weights).json()
    assert (info["status"], info["method"], info["rank"]) == ("created", "BOTTLENECK", 0)
    assert "model.layers.0.mlp.down_proj" in info["modules"]
    ids = server.runtime.tokenizer.encode("abc")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.eval().generate(torch.tensor([ids]), **options)[0, len(ids) :]
    assert server.complete("new", "abc") == server.runtime.tokenizer.decode(expected.tolist())
    raw = json.loads((folder / CONFIG).read_text())
    raw["config"]["use_gating"] = True
    answer = server.push("gated", folder, config=json.dumps(raw).encode(), weights=weights)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "use_gating"


def test_show_list_and_delete(server: Served) -> None:
    server.push("new", server.make_adapter("ia3", 13))
    server.complete("new", "abc")
    info = server.http.get("/v1/adapters/new").json()
    assert info["num_requests"] == 1
    assert info["last_used_at"] is not None
    assert info["residency"] == "device"
    assert info["num_running"] == 0
    assert info in server.http.get("/v1/adapters").json()["data"]
    assert server.http.delete("/v1/adapters/new").json()["deleted"] is True
    assert server.http.get("/v1/adapters/new").status_code == 404
    assert server.http.delete("/v1/adapters/new").status_code == 404
    answer = server.http.post("/v1/completions", json={"model": "new", "prompt": "abc"})
    assert answer.status_code == 404, "never the base model in its stead"


def test_running_requests_finish_on_the_old_weights(server: Served) -> None:
    old, new = server.make_adapter("lora-r4", 14), server.make_adapter("lora-r4", 15)
    server.push("new", old)
    expected = server.complete("new", "abc", max_tokens=300)
    body = {"model": "new", "prompt": "abc", "max_tokens": 300, "temperature": 0, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as stream:
        lines = stream.iter_lines()
        events = [next(lines)]
        assert server.push("new", new).json()["status"] == "updated"
        assert server.complete("new", "abc") == server.expected("abc", [(new, 1.0)])
        events += lines
    data = [e.removeprefix("data: ") for e in events if e.startswith("data: {")]
    assert "".join(json.loads(d)["choices"][0]["text"] for d in data) == expected


def changed(folder: Path, **changes: Any) -> bytes:
    """The folder's config with other values."""
    return json.dumps(json.loads((folder / CONFIG).read_text()) | changes).encode()


@pytest.mark.parametrize(
    "case",
    ["rank", "method", "not json", "array", "truncated", "pickle", "lfs", "empty", "nan", "extra",
     "missing", "prefix", "base"],
)  # fmt: skip
def test_refusals_are_422_and_say_why(server: Served, case: str) -> None:
    folder = server.make_adapter("lora-r4", 16)
    weights = (folder / WEIGHTS).read_bytes()
    tensors = load_file(folder / WEIGHTS)
    key = min(tensors)
    config: bytes | None = None
    param: str | None = key
    match case:
        case "rank":
            config, param = changed(folder, r=8), None
        case "method":
            config, param = changed(folder, peft_type="BOFT"), "peft_type"
        case "not json":
            config, param = b"{", "config"
        case "array":
            config, param = b"[]", "config"
        case "truncated":
            weights, param = weights[:-1000], "weights"
        case "pickle":
            weights, param = b"PK\x03\x04" + bytes(500), "weights"
        case "lfs":
            weights, param = (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "weights",
            )
        case "empty":
            weights, param = b"", "weights"
        case "nan":
            tensors[key][0, 0] = float("nan")
            weights = save(tensors)
        case "extra":
            tensors[f"{key}.more"] = tensors[key].clone()
            weights, param = save(tensors), f"{key}.more"
        case "missing":
            del tensors[key]
            weights = save(tensors)
        case "prefix":
            weights = save({k.removeprefix("base_model."): v for k, v in tensors.items()})
            param = None
        case "base":
            weights = save({k: v.repeat(1, 2) if "lora_A" in k else v for k, v in tensors.items()})
            param = None
    answer = server.push("bad", folder, config=config, weights=weights)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    assert server.http.get("/v1/adapters/bad").status_code == 404


def test_too_large(server: Served) -> None:
    """For the adapters' memory, and for an upload at all: 413 with both sizes."""
    big = server.make_adapter("lora-r8-all", 17, r=512)
    answer = server.push("big", big)
    assert answer.status_code == 413, answer.text
    assert str(4 << 20) in answer.json()["error"]["message"]
    for weights in (bytes(9 << 20), bytes(40 << 20)):
        answer = server.push("big", big, weights=weights)
        assert answer.status_code == 413
        assert str(8 << 20) in answer.json()["error"]["message"]


def test_too_large_without_an_announced_length(server: Served) -> None:
    def parts() -> Iterator[bytes]:
        yield part("weights", "w", b"")[:-2]
        for _ in range(20):
            yield bytes(1 << 20)

    answer = server.http.post("/v1/adapters", content=parts(), headers=multipart())
    assert answer.status_code == 413
    assert str(8 << 20) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "status"),
    [("", 400), ("a/b", 400), ("../up", 400), ("a:b", 400), ("a@b", 400), (".hidden", 400),
     ("x" * 129, 400), ("line\nbreak", 400), ("tiny", 409), ("x" * 128, 201), ("A-1_b.c", 201)],
)  # fmt: skip
def test_names(server: Served, name: str, status: int) -> None:
    answer = server.push(name, server.make_adapter("lora-r4", 18))
    assert answer.status_code == status, answer.text
    if status != 201:
        assert answer.json()["error"]["param"] == "name"


def multipart() -> dict[str, str]:
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, filename: str | None, content: bytes) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def whole_body(folder: Path, name: str = "new") -> bytes:
    return b"".join(
        [
            part("name", None, name.encode()),
            part("config", "c", (folder / CONFIG).read_bytes()),
            part("weights", "w", (folder / WEIGHTS).read_bytes()),
            f"--{BOUNDARY}--\r\n".encode(),
        ]
    )


def test_field_kinds(server: Served) -> None:
    """The config may be a plain field, the name a file; the weights must be a file."""
    folder = server.make_adapter("lora-r4", 19)
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    end = f"--{BOUNDARY}--\r\n".encode()
    body = part("name", "n", b"new") + part("config", None, config) + part("weights", "w", weights)
    answer = server.http.post("/v1/adapters", content=body + end, headers=multipart())
    assert answer.status_code == 201, answer.text
    body = part("name", None, b"new") + part("config", None, config) + part("weights", None, b"w")
    answer = server.http.post("/v1/adapters", content=body + end, headers=multipart())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "weights"


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
def test_missing_fields(server: Served, missing: str) -> None:
    fields = {"name": b"new", "config": b"{}", "weights": b"w"}
    files = {k: ("f", v) for k, v in fields.items() if k != missing}
    answer = server.http.post("/v1/adapters", files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == missing


@pytest.mark.parametrize(
    ("extra", "param"), [("weights", "weights"), ("path", "path"), ("name", "name")]
)
def test_repeated_and_unknown_fields(server: Served, extra: str, param: str) -> None:
    folder = server.make_adapter("lora-r4", 20)
    body = part(extra, "f", b"x") + whole_body(folder)
    answer = server.http.post("/v1/adapters", content=body, headers=multipart())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"{}", {"Content-Type": "application/json"}),
        (b"", {}),
        (b"", {"Content-Type": "multipart/form-data"}),
        (b"no parts", multipart()),
        (b"", multipart()),
        (b"--boundary\r\n\r\nno header\r\n--boundary--\r\n", multipart()),
    ],
)
def test_bodies_that_are_no_upload(server: Served, content: bytes, headers: dict[str, str]) -> None:
    answer = server.http.post("/v1/adapters", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_upload(server: Served, share: float) -> None:
    """The body ends early although the request is complete: a field is missing or cut off."""
    body = whole_body(server.make_adapter("lora-r4", 21))
    cut = body[: int(len(body) * share)]
    answer = server.http.post("/v1/adapters", content=cut, headers=multipart())
    assert answer.status_code == 400
    assert server.http.get("/v1/adapters/new").status_code == 404


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("reset", [False, True])
def test_aborted_upload(server: Served, share: float, reset: bool) -> None:
    """The client leaves before it sent what it announced, orderly or not."""
    body = whole_body(server.make_adapter("lora-r8-all", 22, r=128))
    assert len(body) > 1 << 20, "more than what is spooled in memory"
    num_open = num_open_nameless_files()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: {multipart()['Content-Type']}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + body[: int(len(body) * share)])
        time.sleep(0.1)
    wait_until(lambda: num_open_nameless_files() == num_open)
    assert server.http.get("/v1/adapters/new").status_code == 404
    assert server.push("new", server.make_adapter("lora-r4", 23)).status_code == 201
