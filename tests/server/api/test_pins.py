"""Pinned and prefetched adapters: loaded before they are asked for, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.build import SetupError
from tests import tiny
from tests.server.api.test_lifecycle import LONG, stream, wait_until
from tests.serving import Served, serve

#: Room for four adapters of 18,432 bytes.
POOLS = {"adapter_memory": str(4 * 18_432)}
NAMES = [f"adapter-{seed}" for seed in range(5)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, **POOLS) as served:
        for seed, name in enumerate(NAMES):
            assert served.push(name, served.make_adapter("lora-r4", seed)).status_code == 201
        yield served
        served.wait_idle()


def tier(server: Served, name: str) -> str:
    return server.http.get(f"/v1/adapters/{name}").json()["tier"]


def test_a_pinned_adapter_is_loaded_and_stays(server: Served) -> None:
    answer = server.http.put("/v1/adapters/adapter-0/pin")
    assert (answer.status_code, answer.json()["pinned"]) == (200, True)
    wait_until(lambda: tier(server, "adapter-0") == "device")
    num_loads = server.runtime.stats()["num_adapter_loads"]
    for _ in range(2):
        for name in NAMES[1:]:
            server.complete(name, "abc")
    assert server.runtime.stats()["num_adapter_evictions"] >= 4
    assert tier(server, "adapter-0") == "device"
    hits = server.runtime.stats()["num_adapter_hits"]
    server.complete("adapter-0", "abc")
    assert server.runtime.stats()["num_adapter_hits"] == hits + 1
    assert server.runtime.stats()["num_adapter_loads"] > num_loads

    answer = server.http.delete("/v1/adapters/adapter-0/pin")
    assert (answer.status_code, answer.json()["pinned"]) == (200, False)
    for name in NAMES[1:]:
        server.complete(name, "abc")
    assert tier(server, "adapter-0") == "disk"


def test_a_pin_that_would_lock_others_out_is_409(server: Served) -> None:
    for name in NAMES[:3]:
        assert server.http.put(f"/v1/adapters/{name}/pin").status_code == 200
    answer = server.http.put("/v1/adapters/adapter-3/pin")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "adapter_memory_full"
    assert server.http.get("/v1/adapters/adapter-3").json()["pinned"] is False
    for name in NAMES:
        server.complete(name, "abc")
    # Nor may an upload bring what could never be loaded, under a pinned name or another.
    big = server.make_adapter("lora-r4", 9, r=8)
    for name in ("new", "adapter-0"):
        answer = server.push(name, big)
        assert answer.status_code == 409
    mixture = [{"name": name} for name in NAMES[3:]]
    body = {"model": "tiny", "prompt": "abc", "adapters": mixture}
    assert server.http.post("/v1/completions", json=body).status_code == 413
    server.wait_idle()
    assert "polypeft_pinned_adapters 3.0" in server.http.get("/metrics").text


def test_a_pin_belongs_to_the_name(server: Served) -> None:
    """What the name stands for after a flip is kept in its turn; a deleted one is not."""
    server.http.put("/v1/adapters/adapter-0/pin")
    assert server.push("adapter-0", server.make_adapter("lora-r4", 77)).status_code == 201
    assert server.http.get("/v1/adapters/adapter-0").json()["pinned"] is True
    wait_until(lambda: tier(server, "adapter-0") == "device")
    for name in NAMES[1:]:
        server.complete(name, "abc")
    assert tier(server, "adapter-0") == "device"
    assert server.http.delete("/v1/adapters/adapter-0").json()["pinned"] is True
    for name in NAMES[1:]:
        server.complete(name, "abc")
    assert [tier(server, name) for name in NAMES[1:]] == ["device"] * 4
    assert server.push("adapter-0", server.make_adapter("lora-r4", 0)).json()["pinned"] is False


def test_pins_survive_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path / "one", **POOLS) as server:
        folder = server.make_adapter("lora-r4", 1)
        server.push("poet", folder)
        server.http.put("/v1/adapters/poet/pin")
    data = tmp_path / "one" / "data"
    runtime = tiny.runtime(tiny.llama(), data, **POOLS)
    runtime.start()
    digest = runtime.adapters.get("poet").digest
    wait_until(lambda: runtime.engine.cache.residency(digest) == "device")
    runtime.close()
    with pytest.raises(SetupError, match="--adapter-memory: pinned adapters would take"):
        tiny.runtime(tiny.llama(), data, adapter_memory="8KiB")
    tiny.runtime(tiny.llama(), data, **POOLS).close()


def test_prefetch(server: Served) -> None:
    answer = server.http.post("/v1/adapters/adapter-4/prefetch")
    assert answer.status_code == 202
    assert answer.json()["name"] == "adapter-4"
    wait_until(lambda: tier(server, "adapter-4") == "device")
    misses = server.runtime.stats()["num_adapter_misses"]
    server.complete("adapter-4", "abc")
    assert server.runtime.stats()["num_adapter_misses"] == misses
    for name in NAMES[:4]:
        server.complete(name, "abc")
    assert tier(server, "adapter-4") == "disk", "it is no pin"


def test_prefetch_evicts_nothing_that_runs(server: Served) -> None:
    server.slow_down(0.002)
    body = LONG | {"max_tokens": 200}
    with ExitStack() as stack:
        running = [stack.enter_context(stream(server, body | {"model": n})) for n in NAMES[:4]]
        assert server.http.post("/v1/adapters/adapter-4/prefetch").status_code == 202
        assert server.http.put("/v1/adapters/adapter-4/pin").status_code == 200
        assert tier(server, "adapter-4") == "disk"
        assert [list(events)[-1] for events in running] == ["data: [DONE]"] * 4
    # The pin waited for room, and has it now.
    wait_until(lambda: tier(server, "adapter-4") == "device")


@pytest.mark.parametrize(
    ("method", "action"), [("PUT", "pin"), ("DELETE", "pin"), ("POST", "prefetch")]
)
@pytest.mark.parametrize("name", ["nobody", "tiny", "..", "%2e%2e%2fup", "a%00b", "x" * 3000])
def test_unknown_names_are_404(server: Served, method: str, action: str, name: str) -> None:
    assert server.http.request(method, f"/v1/adapters/{name}/{action}").status_code in (404, 405)
