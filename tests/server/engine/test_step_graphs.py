"""Replayed decode steps against the same steps computed eagerly, and against HF peft."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.ops import VARIABLE
from server.engine.step_graphs import StepGraphs, graph_sizes, unfit
from server.models.loader import prepare_model
from tests import tiny
from tests.recorder import Recorder, compare

pytest.importorskip("triton", reason="there is no triton for this platform")
if torch.cuda.is_available():
    pytest.skip("launches are recorded in Triton's interpreter", allow_module_level=True)

from tests.server.engine import tape

MAX_ROWS = 6
#: Wholly the kernels' once it decodes, and not; by `tiny.peft_configs`' names.
CAPTURED = ("lora-r4", "lora-r8-all", "dora", "lora_bias", "lora-head", "prefix", "prompt")
EAGER = ("lora-embedding", "ia3", "lora-tokens", "oft")
CHANGES: dict[str, Any] = {"max_num_seqs": MAX_ROWS, "max_num_batched_tokens": 64}


class World:
    """An engine with graphs and its twin without, of one model, with adapters of both kinds."""

    def __init__(
        self, folder: Path, names: Sequence[str] = (*CAPTURED, *EAGER), **changes: Any
    ) -> None:
        self.model = tiny.llama(num_hidden_layers=1)
        self.runtime = tiny.runtime(self.model, folder / "data", **(CHANGES | changes))
        self.paths: dict[str, Path] = {}
        configs = tiny.peft_configs("llama")
        for seed, name in enumerate(names):
            path = tiny.save_random_adapter(self.model, configs[name], folder / name, seed)
            tiny.register(self.runtime, name, path)
            self.paths[name] = path
        self.runner = self.runtime.engine.runner
        self.graphs = StepGraphs(
            self.runner.loaded, self.runner.pool, tape.capture, max_rows=MAX_ROWS,
            max_model_len=self.runtime.max_model_len,
        )  # fmt: skip
        self.recorder = Recorder(self.runtime)
        self._num_requests = 0

    def add(self, *parts: tuple[str, float], num_tokens: int = 4, prompt_len: int = 5) -> Any:
        rng = random.Random(self._num_requests)
        self._num_requests += 1
        prompt = [rng.randrange(256) for _ in range(prompt_len)]
        single = len(parts) == 1 and parts[0][1] == 1.0
        name = parts[0][0] if single else "tiny"
        with self.runtime.adapters.lease(name, None if single or not parts else parts) as lease:
            key = f"r{self._num_requests}"
            return self.recorder.add(key, prompt, lease, max_tokens=num_tokens), parts

    def check(self, requests: list[Any]) -> None:
        """Every answer is HF peft's."""
        self.recorder.run()
        for seq, parts in requests:
            oracle = tiny.PeftOracle(self.model, [(self.paths[n], w) for n, w in parts])
            assert compare(self.recorder, seq, oracle) < 1e-4, (seq.key, parts)
        self.runtime.check_integrity()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "triton")
        world = World(tmp_path_factory.mktemp("graphs"))
        world.recorder.load(*CAPTURED, *EAGER)
        yield world
        world.runtime.close()


@pytest.fixture
def world(shared: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Its steps go through the graphs, and each that does is compared with the eager one."""
    monkeypatch.setenv(VARIABLE, "triton")
    execute = shared.graphs.execute
    shared.replayed = []  # type: ignore[attr-defined]

    def checked(batch: Any, adapters: Any) -> Tensor | None:
        cache = (*shared.runner.pool.keys, *shared.runner.pool.values)
        before = [t.clone() for t in cache]
        found = execute(batch, adapters)
        if found is None:
            return None
        found = found.clone()
        after = [t.clone() for t in (*shared.runner.pool.keys, *shared.runner.pool.values)]
        for now, then in zip(
            (*shared.runner.pool.keys, *shared.runner.pool.values), before, strict=True
        ):
            now.copy_(then)
        shared.runner.graphs = None
        try:
            expected = type(shared.runner).execute(shared.runner, batch)
        finally:
            shared.runner.graphs = shared.graphs
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for ours, theirs in zip(after, cache, strict=True):  # no row wrote where it had no slot
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        shared.replayed.append(batch)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(shared.graphs, "execute", checked)
    shared.runner.graphs = shared.graphs
    return shared


def num_adapters(batch: Any) -> int:
    return len({chunk.seq.cache_seed for chunk in batch.chunks})


def test_the_base_alone(world: World) -> None:
    world.check([world.add(num_tokens=5) for _ in range(3)])
    assert len(world.replayed) == 4
    assert all(len(batch.chunks) == 3 for batch in world.replayed)  # of four rows, one is empty


def test_mixed_adapters_and_the_base(world: World) -> None:
    """Beside a mixture; the batch grows and shrinks, and the adapters change between replays."""
    mixture = (("lora-r4", 0.75), ("lora-r8-all", -0.5))
    requests = [world.add(("lora-r4", 1.0), num_tokens=7)]
    for i, name in enumerate(CAPTURED):
        requests.append(world.add((name, 1.0), num_tokens=2 + i % 3))
        world.recorder.engine.step()  # its prompt
        world.recorder.engine.step()
    requests += [world.add(*mixture), world.add(("lora_bias", 0.5)), world.add()]
    world.check(requests)
    found = world.replayed
    assert len({len(batch.chunks) for batch in found}) >= 3, "the batch does not grow"
    assert max(map(num_adapters, found)) >= 3
    assert any(len(c.seq.adapters) == 2 for b in found for c in b.chunks), "no mixture"
    assert len({frozenset(c.seq.cache_seed for c in b.chunks) for b in found}) >= 5


def test_long_contexts_beside_short_ones(world: World) -> None:
    """One of several parts of 256 positions, of which a graph has room for the most."""
    requests = [world.add(prompt_len=n, num_tokens=3) for n in (300, 2, 17)]
    world.check(requests)
    assert world.replayed


@pytest.mark.parametrize("name", EAGER)
def test_what_the_kernels_leave_to_torch_is_eager(world: World, name: str) -> None:
    world.check([world.add((name, 1.0)), world.add(("lora-r4", 1.0))])
    assert not any(
        use.digest == world.runtime.adapters.lease(name).uses[0].digest
        for batch in world.replayed for chunk in batch.chunks for use in chunk.seq.adapters
    )  # fmt: skip


def test_more_work_than_a_graph_holds_is_eager(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for graph in world.graphs._graphs.values():
        if graph.adapters is not None:
            monkeypatch.setattr(
                graph.adapters, "capacity", graph.adapters.capacity._replace(items=1)
            )
    world.check([world.add(("lora-r4", 1.0)), world.add(("lora-r8-all", 1.0)), world.add()])
    assert all(num_adapters(batch) == 1 for batch in world.replayed)


def test_an_adapter_in_the_range_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fits at a time: each load lies where the one before it lay."""
    monkeypatch.setenv(VARIABLE, "triton")
    names = ("lora-r4", "dora", "lora-r8-all")
    world = World(tmp_path, names, adapter_memory="34KiB")
    world.runner.graphs = world.graphs
    cache, places = world.runtime.engine.cache, set()
    for name in (*names, *names):
        world.check([world.add((name, 1.0), num_tokens=3), world.add(num_tokens=3)])
        places |= {entry.offset for entry in cache._entries.values()}
    assert cache.stats.num_evictions >= 4
    assert 0 in places
    assert world.graphs.num_replays >= 12
    world.runtime.close()


def test_numbers_in_launches_would_show(world: World) -> None:
    """The tape itself: what is not in the static buffers stays as it was captured."""
    buffer, number = torch.tensor([1.0, 2.0]), 3.0
    captured = tape.capture(lambda: buffer * number + buffer.sum())
    assert captured.output.tolist() == [6.0, 9.0]
    buffer.copy_(torch.tensor([10.0, 20.0]))
    number = 100.0
    captured.replay()
    assert captured.output.tolist() == [60.0, 90.0]
    with pytest.raises(AssertionError, match="brings values to the host"):
        tape.capture(lambda: buffer * buffer.sum().item())


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]


def test_which_models_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    loaded = prepare_model(tiny.llama(num_hidden_layers=1), "none", torch.device("cpu"))
    assert "no Triton kernels" in (unfit(loaded) or "")
    monkeypatch.setenv(VARIABLE, "triton")
    loaded = prepare_model(tiny.bert("FEATURE_EXTRACTION"), "none", torch.device("cpu"))
    assert "encoder" in (unfit(loaded) or "")
