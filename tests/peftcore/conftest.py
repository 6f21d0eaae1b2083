"""The worlds, made once a session."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.peftcore.worlds import NAMES, World


@pytest.fixture(scope="session")
def llama_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tiny.llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tiny.gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest) -> World:
    return request.getfixturevalue(f"{request.param}_world")
