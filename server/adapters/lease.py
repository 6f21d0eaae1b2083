"""What keeps the adapters of one request alive, and what the request has to know of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from server.engine.sequence import AdapterUse


class Lease:
    """Keeps the adapters of one request alive; a context manager.

    Attributes:
        label: the model name to answer with.
        names: the adapters' names, empty for the base.
        uses: the adapters, empty for the base.
        num_virtual_tokens: positions that they take before the prompt.
        virtual_kv: those positions' keys and values are given, not computed.
        task: that one of the adapters is for where it does not generate; None: they all do.
        labels: of a classifier's classes, in the order of its head's rows.
        problem_type: what is asked of them, as transformers says it; None: nobody said.
    """

    def __init__(
        self,
        label: str,
        uses: tuple[AdapterUse, ...],
        *,
        names: tuple[str, ...] = (),
        num_virtual_tokens: int = 0,
        virtual_kv: bool = False,
        task: str | None = None,
        labels: tuple[str, ...] = (),
        problem_type: str | None = None,
        on_release: Callable[[Lease], None] = lambda lease: None,
    ) -> None:
        self.label = label
        self.uses = uses
        self.names = names
        self.num_virtual_tokens = num_virtual_tokens
        self.virtual_kv = virtual_kv
        self.task = task
        self.labels = labels
        self.problem_type = problem_type
        self._on_release = on_release
        self._released = False

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if not self._released:
            self._released = True
            self._on_release(self)
