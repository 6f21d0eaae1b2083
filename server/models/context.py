"""What the attention of one step needs beside the model's own arguments.

It rides beside the model, not through it: not every model passes unknown arguments on. One forward
pass runs at a time in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from server.models.kv_pool import KVPool


class ChunkRows(NamedTuple):
    """Rows [start, end) of the batch are positions position.. of one sequence.

    block_table: the sequence's cache blocks, in order, up to its last position here.
    """

    start: int
    end: int
    position: int
    block_table: Sequence[int]

    @property
    def context_len(self) -> int:
        return self.position + self.end - self.start


@dataclass(eq=False)
class ForwardContext:
    """One forward pass: where its rows are written, and what each reads.

    Attributes:
        slots: `[rows]` int64, where the rows' own keys and values go.
        chunks: the rows' sequences; every row is in one.
        causal: does a row see no position behind its own? Else it sees all of its sequence's, which
            is whole in this pass.
        shared: what the attention derives from these once for all layers.
    """

    pool: KVPool
    slots: Tensor
    chunks: Sequence[ChunkRows]
    causal: bool = True
    shared: dict[Hashable, Any] = field(default_factory=dict)


_current = threading.local()


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make `context` the one that attention finds, in this thread."""
    _current.context = context
    try:
        yield context
    finally:
        _current.context = None


def current_context() -> ForwardContext:
    """The context of the running forward pass. Raises RuntimeError outside of one."""
    context = getattr(_current, "context", None)
    if context is None:
        raise RuntimeError("paged attention was called outside of forward_context")
    return context
