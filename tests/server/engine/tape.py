"""A CUDA graph without CUDA: launches are recorded, and run again on the memory they ran on.

`Tape` records every operation of torch and every launch of a Triton kernel that a function makes,
with its arguments: numbers as they were, tensors as the memory where they lay. A replay repeats
these and nothing else, no Python of the function's, as a graph does. So a number that should have
been in a static buffer but went into a launch by value is the captured step's in every later one,
and one that was read back to the host, which a capture does not allow, fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from server.engine.step_graphs import Captured

#: Operations that give values, or shapes that depend on them, to the host.
_READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal")


class Tape(TorchDispatchMode):
    """One function's launches, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").partition(".")[0]
        assert name not in _READING, f"{func} brings values to the host"
        result = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = [t.untyped_storage().data_ptr() not in inputs for t in _tensors(result)]

        def again() -> None:
            found = func(*args, **kwargs)
            for old, new, is_new in zip(_tensors(result), _tensors(found), made, strict=True):
                if is_new:  # else the operation has written where it did before
                    old.copy_(new)

        self.launches.append(again)
        return result

    def launch(self, original: Any, executor: Any, args: Any, kwargs: Any) -> None:
        """A Triton kernel's: what it does to its tensors is one launch."""

        def again() -> None:
            with _disable_current_modes():
                original(executor, *args, **kwargs)

        again()
        self.launches.append(again)

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def capture(function: Callable[[], Tensor]) -> Captured:
    """`step_graphs.Capture` by a tape."""
    tape, original = Tape(), GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        tape.launch(original, executor, args, kwargs)

    GridExecutor.__call__ = launch
    try:
        with tape:
            output = function()
    finally:
        GridExecutor.__call__ = original
    return Captured(output, tape.replay)


__all__ = ["Tape", "capture"]
