"""Shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when a kernel is defined: without a GPU Triton's are run by its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What a command prints does not depend on where the tests run.
os.environ["COLUMNS"] = "120"

from tests import tiny
from tests.serving import Served

# Tiny models gain nothing from a second thread, and lose much where other work shares the cores,
# as other tests do. Nor do those of the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, as it is loaded by its path."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def slow_server(server: Served) -> Iterator[Served]:
    """The folder's server, slow enough for a test to do something while it answers."""
    server.slow_down(0.01)
    yield server
    server.slow_down(0)
