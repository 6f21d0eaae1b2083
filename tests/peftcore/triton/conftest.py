"""On a GPU where there is one, else in Triton's interpreter: see tests/conftest.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def ops() -> Any:
    """The module under test."""
    pytest.importorskip(
        "triton", reason="there is no triton for this platform", exc_type=ImportError
    )
    from peftcore.ops import triton

    return triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def count_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Counter[str]]:
    """Given a module, counts its launches by the kernels' names from then on."""

    def count(module: Any) -> Counter[str]:
        launches: Counter[str] = Counter()

        class Counted:
            def __init__(self, name: str) -> None:
                self.name, self.kernel = name, getattr(module, name)

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launches[self.name] += 1
                return self.kernel[grid]

        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name))
        return launches

    return count
