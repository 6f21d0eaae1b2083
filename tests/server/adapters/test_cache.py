"""The adapters' loader threads leave the engine's alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from server.adapters.cache import yield_to_engine
from tests.peftcore.cpu.cases import threads


def test_a_loader_thread_takes_no_core_from_the_others() -> None:
    """Torch's number of threads is the process's: a new thread takes what any other has set."""
    with threads(2):
        with ThreadPoolExecutor(1, initializer=yield_to_engine) as pool:
            pool.submit(torch.get_num_threads).result()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
