"""The CPU kernels: quantized matmul with segmented adapters, paged attention, norms and gates.

`kernels()` is the compiled module, or None where it cannot be had; torch then computes the same.
The headers beside this file say what each function computes.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

from peftcore.ops.cpu.build import KernelsUnavailable, load

logger = logging.getLogger(__name__)


@cache
def _load() -> tuple[Any, str]:
    try:
        module: ModuleType = load()
    except KernelsUnavailable as exc:
        logger.warning("torch computes in the kernels' place, several times slower: %s", exc)
        return None, str(exc)
    return module, f"{module.CAPABILITY}"


def kernels() -> Any:
    """The compiled module, built at the first call; None where there is no compiler."""
    return _load()[0]


def kernels_status() -> str:
    """The instructions that the kernels use, or "torch: " and why there are no kernels."""
    module, text = _load()
    return text if module is not None else f"torch: {text}"


__all__ = ["kernels", "kernels_status"]
