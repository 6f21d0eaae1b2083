"""Adapters come, change and go while requests run: every answer is right, all memory comes back.

The failures of the field that these tests name: an in-flight request that gets another tenant's
adapter after a load (vllm#47724), stale prefixes after a flip (vllm#42125, #30931), an unload that
frees nothing (vllm#54839), a crash on loading during generation (vllm#13698), a deadlock after
n > 1 (sglang#36894), weights of an evicted adapter left behind (sglang#8103), and starvation behind
a hot adapter (sglang#15129, vllm#16876).
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from peftcore.packing import PackedAdapter
from server.adapters.manager import Lease
from server.adapters.store import PACKED_NAME
from server.engine.scheduler import Batch
from server.engine.sequence import SamplingParams
from server.errors import AdapterLoadFailed, NotFound, ServerError
from server.runtime import Runtime
from tests import tiny

MAX_TOKENS = 6
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12, 99, 98], [200] * 30]
METHODS = ["lora-r4", "lora-r8-all", "dora", "ia3", "prefix", "prompt", "lora-bias-all"]


@dataclass(frozen=True)
class Version:
    """One content of an adapter, and what peft says to each prompt with it."""

    config: bytes
    weights: Path
    answers: list[list[int]]


@dataclass(frozen=True)
class World:
    model: PreTrainedModel
    versions: dict[str, list[Version]]
    base: list[list[int]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two versions of one adapter a method."""
    model = tiny.llama()
    folder = tmp_path_factory.mktemp("churn")
    configs = tiny.peft_configs("llama")
    versions: dict[str, list[Version]] = {}
    for name in METHODS:
        for seed in (1, 2):
            path = tiny.save_random_adapter(model, configs[name], folder / f"{name}-{seed}", seed)
            oracle = tiny.PeftOracle(model, [(path, 1.0)])
            versions.setdefault(name, []).append(
                Version(
                    (path / "adapter_config.json").read_bytes(),
                    path / "adapter_model.safetensors",
                    [oracle.greedy(p, MAX_TOKENS) for p in PROMPTS],
                )
            )
    base = [tiny.PeftOracle(model).greedy(p, MAX_TOKENS) for p in PROMPTS]
    return World(model, versions, base)


@pytest.fixture
def runtime(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """Started; with room for the largest adapter beside one small one, and few sequences."""
    runtime = tiny.runtime(
        world.model, tmp_path, kv_memory="60KiB", adapter_memory="112KiB",
        adapter_host_memory="150KiB", max_num_seqs=6, max_num_batched_tokens=24,
    )  # fmt: skip
    runtime.start()
    yield runtime
    runtime.close()


async def complete(
    runtime: Runtime,
    lease: Lease,
    prompt: list[int],
    n: int = 1,
    stop_after: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[list[int]]:
    """The tokens of each choice; leaves after `stop_after` items, as a client that disconnects."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in range(n)]
    with lease:
        async with aclosing(runtime.generate(prompt, params, lease, n=n)) as deltas:  # type: ignore[type-var]
            count = 0
            async for delta in deltas:
                tokens[delta.index] += [token.token_id for token in delta.tokens]
                count += 1
                if count == stop_after:
                    break
    return tokens


def register(runtime: Runtime, name: str, version: Version) -> str:
    info, _ = runtime.adapters.register(name, version.config, version.weights)
    return info.digest


def all_is_back(runtime: Runtime) -> None:
    runtime.check_integrity()
    stats = runtime.stats()
    assert stats["num_running"] == stats["num_waiting"] == stats["kv_blocks_used"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_churn(world: World, runtime: Runtime, seed: int) -> None:
    rng = random.Random(seed)
    answers = {}
    for name, (first, _) in world.versions.items():
        answers[register(runtime, name, first)] = first.answers
    mistakes: list[str] = []
    num_checked = 0

    async def request() -> None:
        nonlocal num_checked
        name = rng.choice([*METHODS, METHODS[0], METHODS[0], "tiny"])
        i, n = rng.randrange(len(PROMPTS)), rng.choice([1, 1, 1, 3])
        stop_after = rng.choice([None, None, None, 1, 3])
        try:
            lease = runtime.adapters.lease(name)
        except NotFound:
            return
        expected = answers[lease.uses[0].digest][i] if lease.uses else world.base[i]
        await asyncio.sleep(rng.random() * 0.05)
        got = await complete(runtime, lease, PROMPTS[i], n, stop_after)
        for tokens in got:
            want = expected if stop_after is None else expected[: len(tokens)]
            if tokens != want:
                mistakes.append(f"{name}: {tokens} instead of {want}")
            num_checked += 1

    async def change() -> None:
        await asyncio.sleep(rng.random() * 0.1)
        name = rng.choice(METHODS)
        if rng.random() < 0.3:
            try:
                await asyncio.to_thread(runtime.adapters.delete, name)
            except NotFound:
                return
        else:
            version = rng.choice(world.versions[name])
            digest = await asyncio.to_thread(register, runtime, name, version)
            answers[digest] = version.answers

    async def main() -> None:
        for _ in range(6):
            await asyncio.gather(*[request() for _ in range(14)], *[change() for _ in range(4)])

    # A digest is known before it can be leased.
    for pair in world.versions.values():
        for version in pair:
            answers[register(runtime, "scout", version)] = version.answers
    runtime.adapters.delete("scout")
    asyncio.run(main())
    assert not mistakes, mistakes[:5]
    assert num_checked > 80
    all_is_back(runtime)
    assert runtime.stats()["num_adapter_evictions"] > 0, "the arena was meant to be too small"
    assert runtime.stats()["num_preemptions"] > 0, "the cache was meant to be too small"
    for info in runtime.adapters.list():
        runtime.adapters.delete(info.name)
    all_is_back(runtime)
    assert runtime.stats()["adapter_device_bytes"] == 0
    assert runtime.stats()["adapter_host_bytes"] == 0


def test_a_flip_leaves_running_requests_alone(world: World, runtime: Runtime) -> None:
    first, second = world.versions["lora-r4"]
    old = register(runtime, "mine", first)

    async def main() -> None:
        before = runtime.adapters.lease("mine")
        running = asyncio.create_task(complete(runtime, before, PROMPTS[0], n=3))
        await asyncio.sleep(0)
        new = await asyncio.to_thread(register, runtime, "mine", second)
        assert new != old
        after = await complete(runtime, runtime.adapters.lease("mine"), PROMPTS[0])
        assert after == [second.answers[0]]
        assert await running == [first.answers[0]] * 3

    asyncio.run(main())
    all_is_back(runtime)
    with pytest.raises(NotFound, match="is now sha256"):
        runtime.adapters.lease(f"mine@sha256:{old[:12]}")
    assert not runtime.adapters.store.folder(old).exists()


def test_a_deleted_adapter_finishes_what_runs_and_frees_its_memory(
    world: World, runtime: Runtime
) -> None:
    version = world.versions["prefix"][0]
    digest = register(runtime, "gone", version)

    async def main() -> None:
        lease = runtime.adapters.lease("gone")
        task = asyncio.create_task(complete(runtime, lease, PROMPTS[2]))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(runtime.adapters.delete, "gone")
        with pytest.raises(NotFound):
            runtime.adapters.lease("gone")
        assert await task == [version.answers[2]]

    asyncio.run(main())
    all_is_back(runtime)
    assert runtime.stats()["adapter_device_bytes"] == 0
    assert not runtime.adapters.store.folder(digest).exists()


def test_a_loading_adapter_holds_up_nobody_else(world: World, runtime: Runtime) -> None:
    """The cold adapter's load is held; warm requests, and the base's, finish meanwhile."""
    warm, cold = world.versions["lora-r4"][0], world.versions["ia3"][0]
    register(runtime, "warm", warm)
    register(runtime, "cold", cold)
    cache = runtime.engine.cache
    load, gate = cache._load, threading.Event()

    def held(digest: str) -> PackedAdapter:
        if digest == runtime.adapters.get("cold").digest:
            assert gate.wait(30)
        return load(digest)

    async def main() -> None:
        await complete(runtime, runtime.adapters.lease("warm"), PROMPTS[1])
        cache._load = held
        waiting = asyncio.create_task(complete(runtime, runtime.adapters.lease("cold"), PROMPTS[0]))
        for _ in range(3):
            got = await asyncio.gather(
                complete(runtime, runtime.adapters.lease("warm"), PROMPTS[0]),
                complete(runtime, runtime.adapters.lease("tiny"), PROMPTS[0]),
            )
            assert got == [[warm.answers[0]], [world.base[0]]]
        assert not waiting.done()
        assert runtime.adapters.get("cold").residency == "loading"
        gate.set()
        assert await waiting == [cold.answers[0]]

    asyncio.run(main())
    all_is_back(runtime)


def test_a_request_that_leaves_while_its_adapter_loads(world: World, runtime: Runtime) -> None:
    register(runtime, "cold", world.versions["dora"][0])
    cache = runtime.engine.cache
    load, gate = cache._load, threading.Event()

    def held(digest: str) -> PackedAdapter:
        assert gate.wait(30)
        return load(digest)

    cache._load = held

    async def main() -> None:
        task = asyncio.create_task(complete(runtime, runtime.adapters.lease("cold"), PROMPTS[0]))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(runtime.adapters.delete, "cold")
        gate.set()
        for _ in range(200):
            if not runtime.stats()["adapter_device_bytes"]:
                break
            await asyncio.sleep(0.02)

    asyncio.run(main())
    all_is_back(runtime)
    assert runtime.stats()["adapter_device_bytes"] == 0


def test_a_cold_request_is_not_starved_by_hot_ones(world: World, runtime: Runtime) -> None:
    """Three hot adapters are asked for without end; a fourth that needs their room gets in."""
    hot = ["lora-r4", "lora-bias-all", "dora"]
    for name in hot:
        register(runtime, name, world.versions[name][0])
    big = world.versions["lora-r8-all"][1]
    register(runtime, "cold", big)

    done = False
    num_hot = 0

    async def hammer(name: str, length: int) -> None:
        nonlocal num_hot
        while not done:
            lease = runtime.adapters.lease(name)
            got = await complete(runtime, lease, PROMPTS[0], max_tokens=length)
            assert got == [world.versions[name][0].answers[0][:length]]
            num_hot += 1

    async def main() -> None:
        nonlocal done, num_hot
        # Of unlike lengths, so that they never all end at once.
        tasks = [asyncio.create_task(hammer(name, n)) for n in range(1, 7) for name in hot]
        while num_hot < len(tasks):
            await asyncio.sleep(0.001)
        num_hot = 0
        cold = complete(runtime, runtime.adapters.lease("cold"), PROMPTS[0])
        assert await asyncio.wait_for(cold, 30) == [big.answers[0]]
        done = True
        # Those that may overtake it, and those that were ahead of it or came while it ran.
        assert num_hot <= runtime.engine.scheduler.max_overtaken + 3 * len(tasks), num_hot
        await asyncio.gather(*tasks)

    asyncio.run(main())
    all_is_back(runtime)


def test_a_failing_step_ends_its_requests_only(world: World, runtime: Runtime) -> None:
    execute = runtime.engine.runner.execute
    calls = []

    def failing(batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return execute(batch)

    runtime.engine.runner.execute = failing  # type: ignore[method-assign]

    async def main() -> None:
        with pytest.raises(ServerError, match="the request failed"):
            await complete(runtime, runtime.adapters.lease("tiny"), PROMPTS[0])
        got = await complete(runtime, runtime.adapters.lease("tiny"), PROMPTS[0])
        assert got == [world.base[0]]

    asyncio.run(main())
    all_is_back(runtime)


def damage(runtime: Runtime, digest: str) -> None:
    """Cut a stored adapter's weights, and lose what they were compiled to."""
    folder = runtime.adapters.store.folder(digest)
    (folder / PACKED_NAME).unlink()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def test_a_damaged_file_fails_its_own_requests(world: World, runtime: Runtime) -> None:
    version = world.versions["lora-r4"][0]
    damage(runtime, register(runtime, "bad", version))

    async def main() -> None:
        with pytest.raises(ServerError, match="not a readable safetensors file"):
            await complete(runtime, runtime.adapters.lease("bad"), PROMPTS[0])
        got = await complete(runtime, runtime.adapters.lease("tiny"), PROMPTS[0])
        assert got == [world.base[0]]
        # Uploading the same bytes again repairs it.
        await asyncio.to_thread(register, runtime, "bad", version)
        got = await complete(runtime, runtime.adapters.lease("bad"), PROMPTS[0])
        assert got == [version.answers[0]]

    asyncio.run(main())
    all_is_back(runtime)


def test_all_who_wait_for_a_load_that_fails_are_told(world: World, runtime: Runtime) -> None:
    damage(runtime, register(runtime, "bad", world.versions["lora-r4"][0]))

    async def main() -> None:
        waiting = [
            complete(runtime, runtime.adapters.lease("bad"), PROMPTS[0], n=2) for _ in range(4)
        ]
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
        assert all(isinstance(result, AdapterLoadFailed) for result in results), results

    asyncio.run(main())
    runtime.adapters.delete("bad")
    all_is_back(runtime)


def test_a_request_that_outlives_its_lease_fails_alone(world: World, runtime: Runtime) -> None:
    """Its client left and its adapter was deleted before the engine came to it."""
    version = world.versions["ia3"][0]
    register(runtime, "gone", version)

    async def main() -> None:
        other = asyncio.create_task(complete(runtime, runtime.adapters.lease("tiny"), PROMPTS[2]))
        lease = runtime.adapters.lease("gone")
        lease.release()
        await asyncio.to_thread(runtime.adapters.delete, "gone")
        with pytest.raises(ServerError):
            await complete(runtime, lease, PROMPTS[0])
        assert await other == [world.base[2]]

    asyncio.run(main())
    all_is_back(runtime)


def test_a_registration_that_fails_late_leaves_nothing(
    world: World, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are stored, and then the registry cannot take the name."""
    store = runtime.adapters.store

    def broken(name: str, digest: str, *said: object) -> str | None:
        assert store.folder(digest).exists()
        raise OSError("disk full")

    monkeypatch.setattr(store, "set_alias", broken)
    with pytest.raises(OSError, match="disk full"):
        register(runtime, "never", world.versions["ia3"][0])
    all_is_back(runtime)
    assert not store.unreferenced()
    assert not list((store.folder("0" * 64)).parent.iterdir())


def test_adapters_survive_a_restart(world: World, tmp_path: Path) -> None:
    first = tiny.runtime(world.model, tmp_path)
    version = world.versions["ia3"][0]
    digest = register(first, "kept", version)
    first.start()
    asyncio.run(complete(first, first.adapters.lease("kept"), PROMPTS[0]))
    first.close()
    again = tiny.runtime(world.model, tmp_path)
    again.start()
    try:
        info = again.adapters.get("kept")
        assert (info.digest, info.num_requests, info.residency) == (digest, 1, "disk")
        got = asyncio.run(complete(again, again.adapters.lease("kept"), PROMPTS[0]))
        assert got == [version.answers[0]]
    finally:
        again.close()
