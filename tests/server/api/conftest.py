"""One server for each test module, with a few adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served, serve

#: Name → (kind, seed).
ADAPTERS = {"poet": ("lora-r4", 1), "clerk": ("lora-r8-all", 2), "herald": ("prefix", 3)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), max_upload="8MiB") as served:
        for name, (kind, seed) in ADAPTERS.items():
            assert served.push(name, served.make_adapter(kind, seed)).status_code == 201
        yield served
        served.wait_idle()


@pytest.fixture
def adapter_folders(server: Served) -> dict[str, Path]:
    """Where the registered adapters' files were made."""
    return {
        name: next(p for p in server.folder.iterdir() if p.name.startswith(f"{kind}-{seed}-"))
        for name, (kind, seed) in ADAPTERS.items()
    }
