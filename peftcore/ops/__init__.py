"""Segmented operations: each acts on the rows of a packed batch that belong to adapters.

One dispatch: `select(device)` gives the module that implements the operations below for a device.
Every implementation has the signatures of `reference`, which is plain and slow and the oracle of
the tests.
"""

from __future__ import annotations

from types import ModuleType

import torch

from peftcore.ops import grouped
from peftcore.ops.segments import BlocksPart, LowRankPart, MapPart, RowsPart, VectorPart


def select(device: torch.device) -> ModuleType:
    """The implementation for `device`: the functions of `reference`."""
    return grouped


__all__ = ["BlocksPart", "LowRankPart", "MapPart", "RowsPart", "VectorPart", "select"]
