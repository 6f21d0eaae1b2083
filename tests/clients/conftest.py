"""One server with one adapter for the clients' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import Served, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), max_upload="4MiB") as served:
        assert served.push("poet", served.make_adapter("lora-r4", 1)).status_code == 201
        yield served
        served.wait_idle()
