"""One server for each test module, with a few adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
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


class Clients:
    """Makes openai's clients, strict by default, and closes them: what is left for the garbage
    collector may warn in whichever test comes next."""

    def __init__(self) -> None:
        self.made: list[openai.OpenAI] = []

    def __call__(self, server: Served, **options: Any) -> openai.OpenAI:
        usual = {"api_key": "key", "max_retries": 0, "_strict_response_validation": True}
        self.made.append(openai.OpenAI(base_url=f"{server.url}/v1", **usual | options))
        return self.made[-1]


@pytest.fixture
def client_of() -> Iterator[Clients]:
    clients = Clients()
    yield clients
    for client in clients.made:
        client.close()
