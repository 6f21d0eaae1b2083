"""What is taken for an adapter before anything is sent."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clients.adapter_files import CONFIG_NAME, MODEL_CONFIG_NAME, WEIGHTS_NAME, open_adapter
from clients.calls import push_adapter
from clients.errors import InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, folder / WEIGHTS_NAME)
    return folder


def zipped(folder: Path, inside: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, inside + file.name)
    return path


@pytest.mark.parametrize("inside", ["", "some/folder/"])
def test_a_folder_a_zip_and_a_file_are_the_same(folder: Path, inside: str) -> None:
    found = []
    for path in (folder, folder / WEIGHTS_NAME, zipped(folder, inside)):
        with open_adapter(path) as files:
            found.append((files.config, files.weights.read_bytes(), files.weights_name))
    assert found == [found[0]] * 3
    assert found[0][1] == (folder / WEIGHTS_NAME).read_bytes()


def test_what_classes_are_called_comes_along(folder: Path) -> None:
    (folder / MODEL_CONFIG_NAME).write_text('{"id2label": {"0": "no", "1": "yes"}}')
    for path in (folder, folder / WEIGHTS_NAME, zipped(folder, "inside/")):
        with (
            open_adapter(path) as files,
            push_adapter("judge", files, None) as call,
        ):
            name, sent = call.options["files"]["id2label"]
        assert name == MODEL_CONFIG_NAME
        assert json.loads(sent)["id2label"]["1"] == "yes"


def refused(path: Path) -> str:
    with pytest.raises(InvalidInput) as error, open_adapter(path):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing")
    assert WEIGHTS_NAME in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "give the folder" in refused(tmp_path / "notes.txt")
    (tmp_path / "broken.zip").write_text("x")
    assert "give the folder" in refused(tmp_path / "broken.zip")
    (folder / CONFIG_NAME).unlink()
    assert CONFIG_NAME in refused(folder)
    assert CONFIG_NAME in refused(zipped(folder))
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    assert "safe_serialization=True" in refused(folder)
    (folder / CONFIG_NAME).write_text("{}")
    assert "safe_serialization=True" in refused(zipped(folder))


@pytest.mark.parametrize("config", ["", "{", "[]", "null", b"\xff"])
def test_a_config_that_is_no_json_object(folder: Path, config: str | bytes) -> None:
    (folder / CONFIG_NAME).write_bytes(config if isinstance(config, bytes) else config.encode())
    assert CONFIG_NAME in refused(folder)


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -1])
def test_weights_that_are_cut_off(folder: Path, cut: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:cut])
    assert WEIGHTS_NAME in refused(folder)


def test_weights_with_something_behind_them(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    assert f"has {size + 1} bytes and should have {size}" in refused(folder)


@pytest.mark.parametrize(
    "header", ["{}", "[]", "{", '{"a": 1}', '{"a": {"data_offsets": []}}', '{"a": {}}']
)
def test_weights_whose_header_is_none(folder: Path, header: str) -> None:
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert WEIGHTS_NAME in refused(folder)
    assert json.loads((folder / CONFIG_NAME).read_bytes())


def test_a_damaged_zip(folder: Path) -> None:
    path = zipped(folder)
    data = bytearray(path.read_bytes())
    data[data.find(b"adapter_config.json") + 25] ^= 0xFF
    path.write_bytes(bytes(data))
    assert str(path) in refused(path)
