"""How adapters' bytes come into the arena: on a GPU on a stream of their own, beside the steps.

The engine's thread frees, moves and reads ranges of the arena; on a GPU it queues that on its
stream and goes on. The loader's thread fills ranges. Three calls keep the two in order:

    engine   after = mark()                    what it has queued so far ends before the copy begins
    loader   copied = copy(to, from, after)    returns when the bytes are there
    engine   join(copied)                      what it queues from here on begins after the copy

So a range that was freed is not filled while a step still reads it, or before it is zeroed; and one
that was filled is neither read nor freed before. No step waits for a copy: the loader's thread
waits for it, and says so only then.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """The three calls; what `mark` and `copy` return is for the others alone. `join` takes None for
    a copy that did not come about."""

    def mark(self) -> Any: ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any: ...

    def join(self, copied: Any) -> None: ...


class DirectCopies:
    """In host memory: what a thread does is done when it returns."""

    def mark(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def join(self, copied: None) -> None:
        return None


class StreamCopies:
    """From pinned memory to a GPU, on a side stream. Marks and copies are its events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            target.copy_(source, non_blocking=True)
            copied = self._side.record_event()
        copied.synchronize()
        return copied

    def join(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


def copies_for(device: torch.device) -> Copies:
    return StreamCopies(device) if device.type == "cuda" else DirectCopies()


__all__ = ["Copies", "DirectCopies", "StreamCopies", "copies_for"]
