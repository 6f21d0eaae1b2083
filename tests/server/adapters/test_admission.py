"""An adapter's packed form: kept beside its files, read while it is right, made again where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peftcore.packing import PackedAdapter
from peftcore.tasks import Tasks
from server.adapters.admission import Packer
from server.adapters.store import PACKED_NAME
from server.runtime import Runtime
from tests import tiny


class World:
    """A DoRA on a quantized base: its packed form depends on the base's values."""

    def __init__(self, runtime: Runtime, adapter: Path) -> None:
        info, _ = tiny.register(runtime, "one", adapter)
        loaded = runtime.engine.runner.loaded
        self.base, self.dtype, self.digest = loaded.base, loaded.dtype, info.digest
        self.folder = runtime.adapters.store.folder(info.digest)
        self.packer = Packer(loaded.tasks, self.dtype)

    def load(self) -> PackedAdapter:
        return self.packer.load(self.folder, self.digest)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    model = tiny.llama()
    config = tiny.peft_configs("llama")["dora"]
    adapter = tiny.save_random_adapter(model, config, tmp_path / "dora", 0)
    runtime = tiny.runtime(model, tmp_path / "data", quantization="int8")
    yield World(runtime, adapter)
    runtime.close()


def test_a_registered_adapter_is_loaded_without_compiling(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = world.load()
    (world.folder / PACKED_NAME).rename(world.folder / "away")
    assert torch.equal(world.load().data, kept.data)
    (world.folder / "away").rename(world.folder / PACKED_NAME)
    monkeypatch.setattr(Tasks, "compile", None)
    assert torch.equal(world.load().data, kept.data)


@pytest.mark.parametrize("damage", ["none", "empty", "cut", "text", "layout", "kind", "short"])
def test_what_cannot_be_read_is_compiled(world: World, damage: str) -> None:
    expected, path = world.load().data.clone(), world.folder / PACKED_NAME
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    path.unlink()
    if damage in ("empty", "cut", "text"):
        path.write_bytes({"empty": b"", "cut": whole[:-1], "text": b"{}" * 50}[damage])
    elif damage != "none":
        layout = metadata["layout"]
        changed = {"layout": layout[:-1], "kind": layout.replace("LowRank", "HighRank")}
        data = expected[:-64] if damage == "short" else expected
        save_file({"data": data.clone()}, path, metadata | {"layout": changed.get(damage, layout)})
    assert torch.equal(world.load().data, expected)


def test_a_base_of_other_values_has_another_packed_form(world: World, tmp_path: Path) -> None:
    """The same structure in four bits: the file is there and must not be read."""
    other = tiny.runtime(tiny.llama(), tmp_path / "other", quantization="nf4")
    loaded = other.engine.runner.loaded
    packer = Packer(loaded.tasks, loaded.dtype)
    found = packer.load(world.folder, world.digest)
    other.close()
    (world.folder / PACKED_NAME).unlink()
    assert torch.equal(packer.load(world.folder, world.digest).data, found.data)
    assert not torch.equal(world.load().data, found.data)
