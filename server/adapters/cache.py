"""Where adapters are: packed on the host, resident in the device arena, pinned by requests.

The engine's thread owns everything here but the loader's thread, which reads files, compiles, and
copies into a range that was reserved for it. So a step never waits for a load, and a load never
touches what a step reads. Three states: loading, ready, and not here.

Invariant: an adapter that a request has pinned, or that is to be kept, is never evicted; any other
is evicted least recently used first.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from peftcore.arena import AdapterArena
from peftcore.packing import BoundAdapter, Layout, PackedAdapter, bind
from server.adapters.copies import Copies, copies_for
from server.engine.scheduler import Residency
from server.engine.sequence import Sequence
from server.errors import AdapterLoadFailed

logger = logging.getLogger(__name__)

Tier = Literal["device", "host", "disk"]

#: Reads and compiles an adapter by digest; runs on the loader's thread.
Load = Callable[[str], PackedAdapter]
#: Bytes of an adapter's packed form, by digest; quick.
SizeOf = Callable[[str], int]


@dataclass(eq=False)
class Entry:
    """An adapter in the arena. `bound` is None while it loads; `error` says why it could not."""

    digest: str
    offset: int
    num_bytes: int
    pins: int = 0
    layout: Layout = ()
    bound: BoundAdapter | None = None
    error: Exception | None = None


@dataclass
class CacheStats:
    """Counts since the start, and seconds."""

    num_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_evictions: int = 0
    num_failures: int = 0
    load_seconds: float = 0.0


@dataclass(frozen=True)
class _Loaded:
    """What the loader says. `copied` is `Copies.copy`'s, if it came so far."""

    digest: str
    layout: Layout | None
    error: Exception | None
    seconds: float
    copied: Any = None


class HostCache:
    """Packed adapters in host memory, up to `max_bytes`; the oldest go first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._packed: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._packed

    def get(self, digest: str) -> PackedAdapter | None:
        with self._lock:
            packed = self._packed.get(digest)
            if packed is not None:
                self._packed.move_to_end(digest)
            return packed

    def put(self, packed: PackedAdapter) -> None:
        with self._lock:
            if packed.digest in self._packed or packed.num_bytes > self.max_bytes:
                return
            self._packed[packed.digest] = packed
            self.num_bytes += packed.num_bytes
            while self.num_bytes > self.max_bytes:
                _, old = self._packed.popitem(last=False)
                self.num_bytes -= old.num_bytes

    def drop(self, digest: str) -> None:
        with self._lock:
            packed = self._packed.pop(digest, None)
            if packed is not None:
                self.num_bytes -= packed.num_bytes

    def check_integrity(self) -> None:
        """Raises AssertionError unless the bytes add up and are within the budget."""
        assert self.num_bytes == sum(p.num_bytes for p in self._packed.values())
        assert self.num_bytes <= self.max_bytes


class AdapterCache:
    """The resident adapters of one engine.

    Args:
        arena: the device memory that adapters share, in bytes.
        host: packed copies that spare reading and compiling.
        load, size_of: see `Load`, `SizeOf`.
        linears: as for `bind`.
        copies: how bytes come into the arena's memory.
        wake: called from the loader's thread when a load has ended.
    """

    def __init__(
        self,
        arena: AdapterArena,
        host: HostCache,
        *,
        load: Load,
        size_of: SizeOf,
        linears: Mapping[str, tuple[int, int]] | None = None,
        copies: Copies | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.arena = arena
        self.host = host
        self.stats = CacheStats()
        self._load = load
        self._size_of = size_of
        self._linears = linears
        self._copies = copies or copies_for(arena.data.device)
        self._wake = wake
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._doomed: set[str] = set()
        self._kept: frozenset[str] = frozenset()
        self._kept_missing: list[str] = []  # of those, what waits for room to be loaded
        self._pins: dict[tuple[str, int], list[Entry]] = {}
        self._errors: dict[tuple[str, int], Exception] = {}
        self._done: deque[_Loaded] = deque()
        self._pool = ThreadPoolExecutor(1, "adapter-loader", initializer=yield_to_engine)

    # -- what the scheduler asks ---------------------------------------------------------------

    def acquire(self, seq: Sequence) -> Residency:
        """Pin all adapters of `seq`, or none; see `scheduler.Adapters`."""
        if not seq.adapters:
            return "ready"
        if not seq.pinned:
            try:
                entries = self._pin([use.digest for use in seq.adapters])
            except LookupError as exc:  # deleted, and the request's lease is gone: it is leaving
                self._errors[seq.key] = exc
                return "failed"
            if entries is None:
                return "full"
            self._pins[seq.key] = entries
            seq.pinned = True
        entries = self._pins[seq.key]
        error = next((entry.error for entry in entries if entry.error is not None), None)
        if error is not None:
            self._errors[seq.key] = error
            return "failed"
        for entry in entries:
            self._entries.move_to_end(entry.digest)
        return "ready" if all(entry.bound is not None for entry in entries) else "loading"

    def release(self, seq: Sequence) -> None:
        """Drop the pins of `seq`."""
        self._errors.pop(seq.key, None)
        seq.pinned = False
        for entry in self._pins.pop(seq.key, []):
            entry.pins -= 1
            if entry.pins == 0 and entry.digest in self._doomed:
                self.drop(entry.digest)

    def error_of(self, seq: Sequence) -> Exception:
        """Why `acquire` said "failed" of a sequence that is not released yet."""
        return self._errors[seq.key]

    def resident(self, digest: str) -> BoundAdapter:
        """The weights of a pinned adapter that is ready."""
        bound = self._entries[digest].bound
        assert bound is not None
        return bound

    # -- between steps ---------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what the loader has finished."""
        while self._done:
            done = self._done.popleft()
            entry = self._entries[done.digest]
            self._copies.join(done.copied)
            self.stats.load_seconds += done.seconds
            if done.layout is None:
                assert done.error is not None
                logger.error("adapter %s cannot be loaded: %s", done.digest[:12], done.error)
                self.stats.num_failures += 1
                # For those who have it pinned; the next one tries anew.
                entry.error = AdapterLoadFailed(
                    f"the adapter cannot be loaded: {done.error}", code="adapter_load_failed"
                )
                self._remove(entry)
                self._doomed.discard(done.digest)
                continue
            self.stats.num_loads += 1
            entry.layout = done.layout
            entry.bound = self._bind(entry)
            if entry.pins == 0 and done.digest in self._doomed:
                self.drop(done.digest)
        if self._kept_missing:
            self._load_kept()

    def keep(self, digests: frozenset[str]) -> None:
        """From now on hold these, and load those that are not here as soon as there is room."""
        self._kept = digests
        self._kept_missing = sorted(digests - self._entries.keys())
        self._load_kept()

    def _load_kept(self) -> None:
        """Those that find room; a large one that waits for more does not hold up the others.

        One that nobody asks for may wait for as long as running requests take all the room in
        turn; the first request for it waits as the scheduler bounds it, and from then on it stays.
        """
        self._kept_missing = [d for d in self._kept_missing if not self.prefetch(d)]

    def prefetch(self, digest: str) -> bool:
        """Load an adapter that no request has asked for; False where requests hold all the room."""
        if digest in self._entries:
            self._entries.move_to_end(digest)
            return True
        try:
            reserved = self._reserve([digest])
        except LookupError:  # deleted in the meantime
            return True
        if reserved:
            self._entries[digest].pins = 0
        return reserved

    @property
    def is_loading(self) -> bool:
        return any(entry.bound is None for entry in self._entries.values())

    def drop(self, digest: str) -> None:
        """Forget an adapter; now, or when its load or its last pin ends."""
        self.host.drop(digest)
        entry = self._entries.get(digest)
        if entry is None:
            self._doomed.discard(digest)
        elif entry.pins or entry.bound is None:
            self._doomed.add(digest)
        else:
            self._doomed.discard(digest)
            self._remove(entry)

    def residency(self, digest: str) -> str:
        """ "device", "loading", "host" or "disk". May be asked from any thread."""
        entry = self._entries.get(digest)
        if entry is not None:
            return "loading" if entry.bound is None else "device"
        return "host" if digest in self.host else "disk"

    def tier(self, digest: str) -> Tier:
        """Where its weights lie, ready to be used or copied. May be asked from any thread."""
        entry = self._entries.get(digest)
        if entry is not None and entry.bound is not None:
            return "device"
        return "host" if digest in self.host else "disk"

    def _pin(self, digests: Seq[str]) -> list[Entry] | None:
        """Pin all of `digests`, loading those that are not here; None, and no pin, if no room.

        Raises LookupError if one is not registered any more.
        """
        missing = [digest for digest in digests if digest not in self._entries]
        here = [self._entries[digest] for digest in digests if digest in self._entries]
        for entry in here:
            entry.pins += 1  # not to be evicted for one of the others
        reserved = False
        try:
            reserved = self._reserve(missing)
        finally:
            if not reserved:
                for entry in here:
                    entry.pins -= 1
        if not reserved:
            return None
        self.stats.num_hits += len(here)
        self.stats.num_misses += len(missing)
        return [self._entries[digest] for digest in digests]

    def _reserve(self, digests: Seq[str]) -> bool:
        """Make room for all of `digests` and start to load them, pinned once; or load none."""
        sizes = {digest: self._size_of(digest) for digest in digests}
        taken: list[Entry] = []
        for digest, num_bytes in sizes.items():
            offset = self._make_room(num_bytes)
            if offset is None:
                for entry in taken:
                    self._remove(entry)
                return False
            entry = Entry(digest, offset, num_bytes, pins=1)
            self._entries[digest] = entry
            taken.append(entry)
        after = self._copies.mark() if taken else None
        for entry in taken:
            self._pool.submit(self._run_load, entry.digest, entry.offset, entry.num_bytes, after)
        return True

    def _make_room(self, num_bytes: int) -> int | None:
        """A range, after evicting what is unpinned, oldest first, and closing gaps if need be."""
        offset = self.arena.allocate(num_bytes)
        evictable = [
            entry
            for entry in self._entries.values()
            if entry.pins == 0 and entry.bound is not None and entry.digest not in self._kept
        ]
        room = self.arena.num_free + sum(e.num_bytes for e in evictable)
        if offset is not None or room < num_bytes:
            return offset
        for entry in evictable:
            self.stats.num_evictions += 1
            self._remove(entry)
            offset = self.arena.allocate(num_bytes)
            if offset is not None:
                return offset
        self._compact()
        return self.arena.allocate(num_bytes)

    def _compact(self) -> None:
        loading = [e.offset for e in self._entries.values() if e.bound is None]
        moved = self.arena.compact(fixed=loading)
        for entry in self._entries.values():
            if entry.offset in moved and entry.bound is not None:
                entry.offset = moved[entry.offset]
                entry.bound = self._bind(entry)

    def _bind(self, entry: Entry) -> BoundAdapter:
        return bind(entry.digest, entry.layout, self.arena.data, entry.offset, self._linears)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self.arena.free(entry.offset)

    # -- the loader's thread ---------------------------------------------------------------------

    def _run_load(self, digest: str, offset: int, num_bytes: int, after: Any) -> None:
        start = time.perf_counter()
        layout, error, copied = None, None, None
        try:
            packed = self.host.get(digest)
            if packed is None:
                packed = self._load(digest)
                self.host.put(packed)
            if packed.num_bytes > num_bytes:
                raise ValueError(f"{packed.num_bytes} bytes, but the registry says {num_bytes}")
            target = self.arena.data[offset : offset + packed.num_bytes]
            copied = self._copies.copy(target, packed.data, after)
            layout = packed.layout
        except Exception as exc:
            error = exc
        self._done.append(_Loaded(digest, layout, error, time.perf_counter() - start, copied))
        self._wake()

    def close(self) -> None:
        """Stop the loader."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self, live: Seq[Sequence] = ()) -> None:
        """Raises AssertionError unless arena, entries and the pins of `live` sequences agree."""
        assert set(self._pins) == {seq.key for seq in live if seq.pinned}, "pins without a sequence"
        pins: dict[str, int] = {}
        for entries in self._pins.values():
            for entry in entries:
                if entry.error is None:
                    pins[entry.digest] = pins.get(entry.digest, 0) + 1
        assert {d: e.pins for d, e in self._entries.items() if e.pins} == pins, "pins differ"
        self.host.check_integrity()
        if not self.is_loading:
            self.arena.check_integrity()
            used = sum(-(-e.num_bytes // 64) * 64 for e in self._entries.values())
            assert self.arena.num_used == used, "arena ranges without an adapter"


def yield_to_engine() -> None:
    """Thread initializer: work beside the engine must not take the cores from its steps.

    Threads that this one starts inherit its priority, torch's too. `torch.set_num_threads` would
    be no means to the end: what one thread sets, those that compute for the first time later take.
    """
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


__all__ = ["AdapterCache", "CacheStats", "HostCache"]
