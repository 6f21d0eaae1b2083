"""The kernels are compiled, for the instructions that the environment asks for."""

from __future__ import annotations

import os
from typing import Any

import pytest

from peftcore.ops.cpu import kernels, kernels_status
from peftcore.ops.cpu.build import CAPABILITY_VARIABLE


@pytest.fixture(scope="session")
def ops() -> Any:
    """The compiled module."""
    found = kernels()
    assert found is not None, kernels_status()
    asked = os.environ.get(CAPABILITY_VARIABLE)
    assert asked in (None, found.CAPABILITY)
    return found
