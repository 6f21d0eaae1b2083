"""On a GPU where there is one, else in Triton's interpreter: see tests/conftest.py."""

from __future__ import annotations

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
