"""Bug reports of other multi-adapter servers, each a test of this one, over HTTP, against peft.

The classes are numbered as they were collected; `test_churn.py` and `engine/` look at the same
failures from the inside.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import pytest
from safetensors.torch import load_file, save

from tests.server.api.test_lifecycle import LONG, stream, wait_until
from tests.serving import CONFIG, WEIGHTS, Served, serve

#: Room for four of "lora-r4".
MEMORY = 4 * 18_432


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, adapter_memory=MEMORY) as served:
        yield served
        served.wait_idle()


def register(server: Served, name: str, kind: str = "lora-r4", seed: int = 0) -> Path:
    folder = server.make_adapter(kind, seed)
    answer = server.push(name, folder)
    assert answer.status_code in (200, 201), answer.text
    return folder


def text_of(events: Iterator[str]) -> str:
    """What a stream says after its first event."""
    data = [event.removeprefix("data: ") for event in events]
    assert data[-1] == "[DONE]", data[-1]
    return "".join(json.loads(each)["choices"][0]["text"] for each in data[:-1])


def test_1_a_load_does_not_change_a_request_in_flight(server: Served) -> None:
    """vllm#47724: it silently used another tenant's adapter."""
    folder = register(server, "tenant", seed=1)
    expected = server.expected("abc", [(folder, 1.0)], 200)
    body = LONG | {"model": "tenant", "max_tokens": 200, "temperature": 0}
    server.slow_down(0.002)
    with stream(server, body) as events:
        for seed in range(2, 7):  # more than fit: what is not in use is evicted
            register(server, f"other-{seed}", seed=seed)
            server.complete(f"other-{seed}", "abc", max_tokens=2)
        register(server, "tenant", seed=9)
        assert expected.endswith(text_of(events))


@pytest.mark.parametrize("kind", ["lora-r4", "prefix"])
def test_2_a_reload_under_the_name_finds_no_stale_prefix(server: Served, kind: str) -> None:
    """vllm#42125, vllm#30931: cached keys and values of the old weights were used."""
    prompt = "a prompt of several blocks, asked again and again"
    for seed in (1, 2, 1):
        folder = register(server, "mine", kind, seed)
        for _ in range(2):  # the second time from the cache
            assert server.complete("mine", prompt) == server.expected(prompt, [(folder, 1.0)])


def test_3_an_unload_frees_what_the_adapter_took(server: Served) -> None:
    """vllm#54839, vllm#42633: only the name was forgotten, and the slot stayed full."""
    for seed in range(12):
        register(server, "mine", seed=seed)
        server.complete("mine", "abc", max_tokens=1)
        assert server.http.delete("/v1/adapters/mine").status_code == 200
        server.wait_idle()
        stats = server.runtime.stats()
        assert stats["adapter_device_bytes"] == stats["adapter_disk_bytes"] == 0
    assert list(server.runtime.adapters.store.folder("0" * 64).parent.iterdir()) == []


@pytest.mark.parametrize("case", ["prefix", "no target", "empty"])
def test_4_keys_that_fit_nothing_are_not_served_as_the_base(server: Served, case: str) -> None:
    """vllm#34186, vllm#55193: 200, and the base model's answers."""
    folder = server.make_adapter("lora-r4", 1)
    tensors = load_file(folder / WEIGHTS)
    match case:
        case "prefix":
            tensors = {f"model.language_model.{key}": value for key, value in tensors.items()}
        case "no target":
            tensors = {key.replace("q_proj", "qkv"): value for key, value in tensors.items()}
        case "empty":
            tensors = {}
    assert server.push("mine", folder, weights=save(tensors)).status_code == 422
    body = {"model": "mine", "prompt": "abc"}
    assert server.http.post("/v1/completions", json=body).status_code == 404


def test_5_loading_while_others_generate_crashes_nothing(server: Served) -> None:
    """vllm#13698: the server died."""
    names = [f"adapter-{seed}" for seed in range(6)]
    folders = [server.make_adapter("lora-r4", seed) for seed in range(6)]
    server.slow_down(0.001)
    with ExitStack() as stack:
        running = [stack.enter_context(stream(server, LONG)) for _ in range(3)]
        with ThreadPoolExecutor(6) as pool:
            pushed = list(pool.map(server.push, names, folders))
            assert [answer.status_code for answer in pushed] == [201] * 6
            texts = list(pool.map(lambda name: server.complete(name, "abc"), names))
        assert len({text_of(events) for events in running}) == 3  # temperature 1
    assert texts == [server.expected("abc", [(folder, 1.0)]) for folder in folders]


class _Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [False, True])
def test_6_nothing_that_can_run_code_is_read(server: Served, tmp_path: Path, zipped: bool) -> None:
    """sglang#26789, sglang#30165, TensorRT-LLM#13391: pickled tensors were loaded."""
    mark = tmp_path / "mark"
    payload = pickle.dumps(_Payload(mark))
    if zipped:
        file = BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
        payload = file.getvalue()
    assert (
        server.push("mine", server.make_adapter("lora-r4", 1), weights=payload).status_code == 422
    )
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Payload(mark))).close()
    assert mark.exists(), "it would have"


ODD_NAMES = [
    "../up", "/etc/passwd", "a/b", "a\\b", "..", ".", "a\0b", "%2e%2e%2f", "~root", "a b",
]  # fmt: skip


def files_in(folder: Path) -> list[Path]:
    """But for those that the test makes adapters in; the server may be deleting some meanwhile."""
    return sorted(
        Path(parent, name)
        for parent, folders, files in os.walk(folder)  # rglob stumbles over what has just gone
        for name in folders + files
        if "adapters" not in (*Path(parent).parts, name)
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_6_a_name_is_never_a_path(server: Served, tmp_path: Path, name: str) -> None:
    """vllm#46287: one escaped its folder."""
    before = files_in(tmp_path)
    folder = server.make_adapter("lora-r4", 1)
    assert server.push(name, folder).status_code == 400
    bodies = {
        "/v1/completions": {"prompt": "abc"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
        "/v1/embeddings": {"input": "abc"},
        "/v1/classify": {"input": "abc"},
        "/tokenize": {"prompt": "abc"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        for model in (name, f"tiny:{name}", f"{name}@sha256:00"):
            assert server.http.post(path, json=body | {"model": model}).status_code == 404
        if path in list(bodies)[:3]:
            mixture = {"model": "tiny", "adapters": [{"name": name}]}
            assert server.http.post(path, json=body | mixture).status_code == 404
    for load, status in (("load", 403), ("unload", 404)):  # there is no --lora-root
        body = {"lora_name": name} | ({"lora_path": str(folder)} if load == "load" else {})
        assert server.http.post(f"/v1/{load}_lora_adapter", json=body).status_code == status
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name", ODD_NAMES)
def test_6_nor_in_a_url_or_as_a_files_name(server: Served, tmp_path: Path, name: str) -> None:
    register(server, "mine")
    before = files_in(tmp_path)
    spelled = quote(name, safe="").replace(".", "%2E")  # else the client would resolve it
    for method, path in [
        ("GET", "/v1/models/{}"), ("GET", "/v1/adapters/{}"), ("DELETE", "/v1/adapters/{}"),
        ("PUT", "/v1/adapters/{}/pin"), ("DELETE", "/v1/adapters/{}/pin"),
        ("POST", "/v1/adapters/{}/prefetch"),
    ]:  # fmt: skip
        answer = server.http.request(method, path.format(spelled))
        assert answer.status_code == 404, f"{method} {path}: {answer.text}"
    folder = server.make_adapter("lora-r4", 1)
    files = {
        "config": (name, (folder / CONFIG).read_bytes()),
        "weights": (name, (folder / WEIGHTS).read_bytes()),
    }
    answer = server.http.post("/v1/adapters", data={"name": "named"}, files=files)
    assert answer.status_code == 201
    assert server.http.delete("/v1/adapters/named").status_code == 200
    wait_until(lambda: files_in(tmp_path) == before)


def test_7_as_many_adapters_as_fit_and_the_base_in_one_batch(server: Served) -> None:
    """sglang#23141: an assertion failed; sglang#36894: unloading after n > 1 never ended."""
    names = [f"adapter-{seed}" for seed in range(4)]
    folders = {name: register(server, name, seed=seed) for seed, name in enumerate(names)}
    expected = {name: server.expected("abc", [(f, 1.0)]) for name, f in folders.items()}
    expected["tiny"] = server.expected("abc", [])
    server.slow_down(0.01)

    def ask(name: str) -> list[str]:
        body = {"model": name, "prompt": "abc", "n": 3, "temperature": 0, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=body | {"max_tokens": 12})
        return [choice["text"] for choice in answer.json()["choices"]]

    with ThreadPoolExecutor(5) as pool:
        for name, texts in zip(expected, pool.map(ask, expected), strict=True):
            assert texts == [expected[name]] * 3
    for name in names:
        assert server.http.delete(f"/v1/adapters/{name}", timeout=10).status_code == 200


def test_8_an_evicted_adapters_weights_are_not_the_next_ones(tmp_path: Path) -> None:
    """sglang#8103: they stayed in modules that the next adapter does not have."""
    with serve(tmp_path, adapter_memory=90_000) as server:  # the wide one fills it
        folders = {"wide": register(server, "wide", "lora-r8-all", 1)}
        for seed in range(4):
            folders[f"narrow-{seed}"] = register(server, f"narrow-{seed}", seed=seed)
        for name in [*folders, *reversed(folders)]:
            assert server.complete(name, "abc") == server.expected("abc", [(folders[name], 1.0)])
        assert server.runtime.stats()["num_adapter_evictions"] >= 5


def test_9_a_cold_adapter_is_served_beside_hot_ones(server: Served) -> None:
    """sglang#15129, vllm#16876: it starved; sglang#13349: more adapters than slots crawled."""
    for seed in range(5):
        register(server, f"adapter-{seed}", seed=seed)
    server.slow_down(0.001)
    answered: list[int] = []
    stop = False

    def hot(i: int) -> None:
        while not stop:  # of different lengths, so that there is always one that runs
            server.complete(f"adapter-{i % 4}", "abc", max_tokens=20 + i)
            answered.append(i)

    with ThreadPoolExecutor(16) as pool:
        busy = [pool.submit(hot, i) for i in range(16)]
        wait_until(lambda: server.runtime.stats()["num_running"] == 16)
        try:
            for _ in range(3):
                before = len(answered)
                server.complete("adapter-4", "abc", max_tokens=2)
                # Those that were running, and the scheduler's max_overtaken, 32.
                assert len(answered) - before < 64
        finally:
            stop = True
        for future in busy:
            future.result()
    assert set(answered) == set(range(16))


def test_10_ranks_are_true_and_the_base_is_untouched(tmp_path: Path) -> None:
    """vllm#22782, vllm#14435: zeros were computed up to a maximum rank, of every adapter; and
    vllm#10898: adapters slowed the base. Here each takes its own bytes, and base rows are computed
    as if there were none."""
    with serve(tmp_path) as server:
        base = server.complete("tiny", "abc")
        sizes = {}
        for rank in (1, 4, 32):
            folder = server.make_adapter("lora-r4", rank, r=rank)
            assert server.push(f"rank-{rank}", folder).status_code == 201
            sizes[rank] = server.http.get(f"/v1/adapters/rank-{rank}").json()["num_bytes"]
            text = server.complete(f"rank-{rank}", "abc")
            assert text == server.expected("abc", [(folder, 1.0)])
        assert sizes[1] < sizes[4] < sizes[32]
        assert server.complete("tiny", "abc") == base == server.expected("abc", [])


def test_11_methods_mix_in_one_batch(tmp_path: Path) -> None:
    """vllm#10849: no DoRA; peft#759: IA³ and prefix tuning never in one batch."""
    kinds = ["dora", "ia3", "prefix", "prompt", "lora-r8-all"]
    with serve(tmp_path) as server:
        folders = {kind: register(server, kind, kind, seed) for seed, kind in enumerate(kinds)}
        expected = {kind: server.expected("abc", [(f, 1.0)]) for kind, f in folders.items()}
        server.slow_down(0.01)
        with ThreadPoolExecutor(len(kinds)) as pool:
            texts = pool.map(lambda kind: server.complete(kind, "abc"), kinds)
            assert dict(zip(kinds, texts, strict=True)) == expected


def test_12_idle_adapters_stay_in_the_metrics_and_all_survive_a_restart(tmp_path: Path) -> None:
    """vllm#45325: they vanished; vllm#12174: adapters were lost."""
    with serve(tmp_path) as server:
        folder = register(server, "idle", seed=1)
        count = 'polypeft_adapter_requests_total{adapter="idle"}'
        assert f"{count} 0.0" in server.http.get("/metrics").text
        server.complete("idle", "abc")
        for _ in range(3):
            server.complete("tiny", "abc")
            assert f"{count} 1.0" in server.http.get("/metrics").text
        expected = server.expected("abc", [(folder, 1.0)])
        config = (folder / CONFIG).read_bytes()
    (tmp_path / "adapters").rename(tmp_path / "of-the-first")
    with serve(tmp_path) as server:
        assert f"{count} 0.0" in server.http.get("/metrics").text
        assert server.complete("idle", "abc") == expected
        answer = server.push("idle", tmp_path / "of-the-first" / folder.name, config=config)
        assert (answer.status_code, answer.json()["status"]) == (200, "unchanged")


def test_12_an_adapters_tokens_are_counted_while_they_come(server: Served) -> None:
    """So that a table of the load shows long answers, not only their ends."""
    register(server, "busy", seed=1)
    server.slow_down(0.005)
    name = 'polypeft_adapter_tokens_total{adapter="busy",kind="generated"}'

    def count() -> float:
        text = server.http.get("/metrics").text
        return float(text.split(f"{name} ")[1].split("\n")[0])

    with stream(server, LONG | {"model": "busy"}):
        first = count()
        wait_until(lambda: count() > first > 0)
        assert server.runtime.engine.live


def test_12_vllms_gauge_names_what_runs(server: Served) -> None:
    """As routers read it."""
    register(server, "busy", seed=1)
    register(server, "idle", seed=2)
    server.slow_down(0.005)
    with stream(server, LONG | {"model": "busy"}):
        text = server.http.get("/metrics").text
    assert (
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="busy",'
        'waiting_lora_adapters=""}' in text
    )
