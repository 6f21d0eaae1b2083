"""What the attention of one step needs beside the model's own arguments.

It rides beside the model, not through it: not every model passes unknown arguments on. One forward
pass runs at a time in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.models.kv_pool import KVPool


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Rows [start, end) are consecutive positions of one sequence, the first at `position`.

    context_slots: the cache slots of positions 0..position + (end − start), `[context_len]`.
    """

    start: int
    end: int
    position: int
    context_slots: Tensor


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """One row each of several sequences.

    rows: `[n]`, their places in the batch. context_lens: `[n]`. context_slots: `[n,
    max_context_len]`; behind a sequence's own comes its first again, whatever was given: attention
    reads what it masks, and a NaN in another sequence's slot would spread.
    """

    rows: Tensor
    context_slots: Tensor
    context_lens: Tensor

    def __post_init__(self) -> None:
        places = torch.arange(self.context_slots.shape[1], device=self.context_slots.device)
        own = places < self.context_lens[:, None]
        slots = torch.where(own, self.context_slots, self.context_slots[:, :1])
        object.__setattr__(self, "context_slots", slots)


@dataclass(eq=False)
class ForwardContext:
    """One forward pass: where its rows are written, and what each reads.

    slots: `[rows]`, where the rows' own keys and values go. `masks` holds this pass's masks for
    reuse by all layers.
    """

    pool: KVPool
    slots: Tensor
    prompts: Sequence[PromptRows] = ()
    decodes: Sequence[DecodeRows] = ()
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)


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
