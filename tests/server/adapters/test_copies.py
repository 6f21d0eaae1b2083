"""Loads beside the steps, in the worst order that a GPU's streams allow.

There a copy that the host has asked for may come as late as something waits for it, and as early as
what it waits for is over. Both are played here: bytes arrive when the engine joins, no sooner; and
what the engine did to a range must be behind the mark that the copy was given.
"""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.arena import AdapterArena
from server.adapters.admission import Packer
from server.adapters.copies import DirectCopies, copies_for
from tests import tiny
from tests.recorder import Recorder, compare

KINDS = ("lora-r8-all", "lora-r4", "dora", "lora-embedding", "lora-bias-all", "lora-r16-rslora")


class LateCopies:
    """Keeps copies back until they are joined, and looks at what the engine did in between."""

    def __init__(self, arena: AdapterArena) -> None:
        self._arena = arena
        self._clock = itertools.count(1)
        self._touched: list[tuple[int, int, int]] = []  # when, start, end
        self.num_moved = 0
        self.joined: list[int] = []
        self._lock = threading.Lock()
        self._free, self._compact = arena.free, arena.compact
        arena.free = self.free  # type: ignore[method-assign]
        arena.compact = self.compact  # type: ignore[method-assign]

    def free(self, offset: int) -> None:
        self._touch(offset, self._arena._used[offset])
        self._free(offset)

    def compact(self, fixed: Any = ()) -> dict[int, int]:
        before = dict(self._arena._used)
        moved = self._compact(fixed)
        for old, new in moved.items():
            self._touch(old, before[old])
            self._touch(new, before[old])
        self.num_moved += len(moved)
        return moved

    def _touch(self, start: int, length: int) -> None:
        with self._lock:
            self._touched.append((next(self._clock), start, start + length))

    def mark(self) -> int:
        with self._lock:
            return next(self._clock)

    def copy(self, target: Tensor, source: Tensor, after: int) -> Any:
        start = target.storage_offset()
        end = start + len(target)
        with self._lock:
            late = [t for t, low, high in self._touched if t > after and low < end and start < high]
        assert not late, "the range was freed or moved over after the mark"
        assert not target.any(), "the range is not zeroed, so it is somebody's"
        return target, source.clone()

    def join(self, copied: Any) -> None:
        if copied is not None:
            target, source = copied
            target.copy_(source)
            self.joined.append(len(source))


def test_adapters_come_and_go_beside_steps(tmp_path: Path) -> None:
    """Room for one to five of six, so they evict each other; every answer is its adapter's."""
    model = tiny.llama(num_hidden_layers=2)
    runtime = tiny.runtime(
        model, tmp_path / "data", adapter_memory="80KiB", adapter_host_memory="1MiB"
    )
    paths = {}
    configs = tiny.peft_configs("llama")
    for seed, name in enumerate(KINDS):
        paths[name] = tiny.save_random_adapter(model, configs[name], tmp_path / name, seed)
        tiny.register(runtime, name, paths[name])
    cache = runtime.engine.cache
    copies = cache._copies = LateCopies(cache.arena)
    recorder, rng, sequences = Recorder(runtime), random.Random(2), []
    for i, name in enumerate(rng.choices(KINDS, k=60)):
        if i % 4 == 0:
            recorder.run()  # what is pinned by nobody may be evicted then
        with runtime.adapters.lease(name) as lease:
            prompt = [rng.randrange(256) for _ in range(rng.randint(2, 9))]
            sequences.append((recorder.add(f"{name}-{i}", prompt, lease, max_tokens=3), name))
        recorder.engine.step()
    recorder.run()
    for seq, name in sequences:
        assert compare(recorder, seq, tiny.PeftOracle(model, [(paths[name], 1.0)])) < 1e-4, seq.key
    assert cache.stats.num_evictions > 6
    assert len(copies.joined) == cache.stats.num_loads > 6
    assert copies.num_moved, "nothing was moved to close a gap"
    runtime.check_integrity()
    runtime.close()


def test_what_is_loaded_for_a_gpu_lies_in_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file that was kept, and compiled anew."""
    model = tiny.llama(num_hidden_layers=1)
    runtime = tiny.runtime(model, tmp_path / "data")
    path = tiny.save_random_adapter(model, tiny.peft_configs("llama")["dora"], tmp_path / "a")
    info, _ = tiny.register(runtime, "a", path)
    loaded = runtime.engine.runner.loaded
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    folder = runtime.adapters.store.folder(info.digest)
    plain = Packer(loaded.tasks, loaded.dtype).load(folder, info.digest)
    assert not pinned
    packer = Packer(loaded.tasks, loaded.dtype, pin_memory=True)
    for num in (1, 2):
        packed = packer.load(folder, info.digest)
        assert len(pinned) == num
        assert packed.data is pinned[-1]
        assert packed.data.is_contiguous()
        assert torch.equal(packed.data, plain.data)
        (folder / "packed.safetensors").unlink(missing_ok=True)
    runtime.close()


def test_a_cpu_s_bytes_are_there_at_once() -> None:
    copies = copies_for(torch.device("cpu"))
    assert isinstance(copies, DirectCopies)
    target = torch.zeros(4)
    copies.join(copies.copy(target, torch.ones(4), copies.mark()))
    assert target.sum() == 4
