"""vLLM's endpoints: a client's path, what it may lead to, and vLLM's answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import CONFIG, WEIGHTS, Served, serve


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/inside/… is allowed, root/outside is not."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "inside").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serve(folder, lora_root=root / "inside", max_upload="1MiB") as served:
        for seed, place in enumerate(
            ("inside/a", "inside/b", "inside/deep/c", "outside", "inside2")
        ):
            shutil.copytree(served.make_adapter("lora-r4", seed), root / place)
        yield served
        served.wait_idle()


@pytest.fixture(autouse=True)
def unloaded(server: Served) -> Iterator[None]:
    yield
    for model in server.http.get("/v1/adapters").json()["data"]:
        server.http.delete(f"/v1/adapters/{model['name']}")


def load(server: Served, path: object, name: str = "mine", **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)} | fields
    return server.http.post("/v1/load_lora_adapter", json=body)


def unload(server: Served, name: str, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name} | fields)


def test_load_and_unload(server: Served, root: Path) -> None:
    answer = load(server, root / "inside" / "a")
    assert answer.status_code == 200, answer.text
    assert answer.text == "Success: LoRA adapter 'mine' added successfully."
    models = {model["id"]: model for model in server.http.get("/v1/models").json()["data"]}
    assert models["mine"]["parent"] == "tiny"
    assert models["mine"]["root"].startswith("mine@sha256:")
    expected = server.expected("abc", [(root / "inside" / "a", 1.0)])
    assert server.complete("mine", "abc") == expected
    answer = unload(server, "mine", lora_int_id=1)
    assert answer.text == "Success: LoRA adapter 'mine' removed successfully."
    assert server.http.get("/v1/adapters/mine").status_code == 404
    answer = unload(server, "mine")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "The lora adapter 'mine' cannot be found."


def test_a_second_load_needs_load_inplace(server: Served, root: Path) -> None:
    assert load(server, "a").status_code == 200
    for path in ("a", "b"):
        answer = load(server, path)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("The lora adapter 'mine' has already been loaded.")
    assert load(server, "b", load_inplace=True).status_code == 200
    assert server.complete("mine", "abc") == server.expected("abc", [(root / "inside" / "b", 1.0)])


def test_the_files_are_copied(server: Served, root: Path) -> None:
    shutil.copytree(root / "inside" / "a", root / "inside" / "gone")
    expected = server.expected("abc", [(root / "inside" / "gone", 1.0)])
    assert load(server, "gone").status_code == 200
    shutil.rmtree(root / "inside" / "gone")
    assert server.complete("mine", "abc") == expected


@pytest.mark.parametrize("path", ["deep/c", "deep/./c", "deep//c/", "link", "files"])
def test_what_stays_inside_is_found(server: Served, root: Path, path: str) -> None:
    """Also through links, as model hubs' caches have them."""
    inside = root / "inside"
    if path == "link":
        (inside / path).symlink_to(inside / "deep" / "c")
    if path == "files":
        (inside / path).mkdir()
        for name in (CONFIG, WEIGHTS):
            (inside / path / name).symlink_to(inside / "deep" / "c" / name)
    assert load(server, path).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["../outside", "a/../../outside", "a/../b", "{root}/outside", "{root}/inside2", "/etc",
     "/etc/passwd", "{root}/inside/../outside", "out", "out-file", "out-config", "..", "/"],
)  # fmt: skip
def test_what_leads_out_is_403(server: Served, root: Path, path: str) -> None:
    inside = root / "inside"
    if path == "out":
        (inside / path).symlink_to(root / "outside")
    if path in ("out-file", "out-config"):
        shutil.copytree(inside / "a", inside / path)
        name = WEIGHTS if path == "out-file" else CONFIG
        (inside / path / name).unlink()
        (inside / path / name).symlink_to(root / "outside" / name)
    answer = load(server, path.format(root=root))
    assert answer.status_code == 403, answer.text
    assert answer.json()["error"]["param"] == "lora_path"
    assert server.http.get("/v1/adapters").json()["data"] == []


def test_a_link_that_appears_after_the_check_is_not_followed(
    server: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = root / "inside"
    shutil.copytree(inside / "a", inside / "swapped")
    resolve = Path.resolve

    def swap(self: Path, strict: bool = False) -> Path:
        real = resolve(self, strict)
        if self.name == WEIGHTS and not (inside / "swapped").is_symlink():
            shutil.rmtree(inside / "swapped")
            (inside / "swapped").symlink_to(root / "outside")
        return real

    monkeypatch.setattr(Path, "resolve", swap)
    assert load(server, "swapped").status_code == 404


@pytest.mark.parametrize("case", ["missing", "empty", "pickled", "pipe", "circle", "long", "file"])
def test_what_is_no_adapter_is_404(server: Served, root: Path, case: str) -> None:
    folder = root / "inside" / f"no-{case}"
    path = str(folder)
    match case:
        case "empty":
            folder.mkdir()
        case "pickled":
            folder.mkdir()
            shutil.copy(root / "inside" / "a" / CONFIG, folder)
            (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
        case "pipe":
            folder.mkdir()
            shutil.copy(root / "inside" / "a" / CONFIG, folder)
            os.mkfifo(folder / WEIGHTS)
        case "circle":
            folder.symlink_to(folder)
        case "long":
            path = "x" * 5000
        case "file":
            folder.write_text("no folder")
    answer = load(server, path)
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["param"] == "lora_path"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"lora_path": "a\0b"}, 400, "lora_path"),
        ({"lora_path": ""}, 400, "lora_path"),
        ({"lora_path": 1}, 400, "lora_path"),
        ({"lora_name": "../x"}, 400, "lora_name"),
        ({"lora_name": ""}, 400, "lora_name"),
        ({"lora_name": "tiny"}, 409, "lora_name"),
        ({"load_inplace": "yes"}, 400, "load_inplace"),
        ({"is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_wrong_fields(server: Served, fields: dict[str, Any], status: int, param: str) -> None:
    body = {"lora_name": "mine", "lora_path": "a"} | fields
    answer = server.http.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_refused_adapter_says_why(server: Served, root: Path) -> None:
    folder = root / "inside" / "broken"
    shutil.copytree(root / "inside" / "a", folder)
    (folder / WEIGHTS).write_bytes(b"no safetensors")
    answer = load(server, "broken")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "weights")
    (folder / WEIGHTS).write_bytes(bytes(2 << 20))
    assert load(server, "broken").status_code == 413


def test_without_a_root_no_path_is_read(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        answer = load(server, server.make_adapter("lora-r4", 1))
        assert answer.status_code == 403
        assert "--lora-root" in answer.json()["error"]["message"]
