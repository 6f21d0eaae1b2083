"""One server with one adapter for the clients' tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.serving import Served, serve

LABELS = ["anger", "joy", "calm"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), max_upload="4MiB") as served:
        assert served.push("poet", served.make_adapter("lora-r4", 1)).status_code == 201
        yield served
        served.wait_idle()


def classifiers(server: Served) -> dict[str, Path]:
    """Folders of `mood`, which classifies texts as LABELS, and `names`, which classifies tokens."""
    folders = {}
    for name, task, num_labels in (("mood", "SEQ_CLS", 3), ("names", "TOKEN_CLS", 4)):
        config = tiny.peft_configs("llama", task)["lora-r4"]
        model = tiny.for_task(server.model, task, num_labels)
        folders[name] = tiny.save_random_adapter(model, config, server.folder / name)
    labels = {"id2label": dict(enumerate(LABELS))}
    (folders["mood"] / "config.json").write_text(json.dumps(labels))
    return folders
