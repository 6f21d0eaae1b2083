"""Which rows an operation touches, at which module, and with what."""

from __future__ import annotations

import threading
from typing import NamedTuple

from torch import Tensor


class LowRankPart(NamedTuple):
    """Rows [start, end) get scale · (x Aᵀ) Bᵀ.  a_t: `[in, rank]`, b_t: `[rank, out]`."""

    start: int
    end: int
    a_t: Tensor
    b_t: Tensor
    scale: float


class VectorPart(NamedTuple):
    """Rows [start, end) meet `v`, `[features]`, times `weight` where it is added."""

    start: int
    end: int
    v: Tensor
    weight: float = 1.0


class BlocksPart(NamedTuple):
    """Rows [start, end) meet a block-diagonal matrix.  blocks: `[num_blocks, b, b]`."""

    start: int
    end: int
    blocks: Tensor


class MapPart(NamedTuple):
    """Rows [start, end) go through another map.  weight: `[out, in]`, bias: `[out]` or None."""

    start: int
    end: int
    weight: Tensor
    bias: Tensor | None


class RowsPart(NamedTuple):
    """For rows [start, end) of the batch a weight's rows `ids` are `rows`.

    ids: `[k]` int64, distinct, at least one; rows: `[k, dim]`, times `scale` where they are looked
    up.
    """

    start: int
    end: int
    ids: Tensor
    rows: Tensor
    scale: float = 1.0


_ids: dict[str, int] = {}
_ids_lock = threading.Lock()


def module_id(path: str) -> int:
    """A number for a module's path, the same for the life of the process."""
    found = _ids.get(path)
    if found is None:
        with _ids_lock:
            found = _ids.setdefault(path, len(_ids))
    return found
