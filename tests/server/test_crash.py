"""The server as a process, killed in the middle of its work again and again.

After each restart every acknowledged adapter answers as peft does, what was under way is there as a
whole or not at all, and the registry and the files agree.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from server.adapters.store import AdapterStore
from tests import tiny
from tests.serving import CONFIG, WEIGHTS

KILLS = int(os.environ.get("POLYPEFT_TEST_KILLS", "10"))
MAX_TOKENS = 8
PROMPT = "abc"
KINDS = ["lora-r4", "lora-r8-all", "ia3", "prefix"]
#: What is interrupted → the longest time, in seconds, from its start to the kill.
MAX_DELAY = {"upload": 0.2, "flip": 0.15, "delete": 0.03, "generation": 0.3}


@dataclass
class World:
    """Contents, what peft says with each, and what the server has acknowledged.

    Attributes:
        answers: content → its greedy text.
        acknowledged: name → content.
    """

    model_folder: Path
    data: Path
    contents: list[Path]
    answers: dict[Path, str]
    acknowledged: dict[str, Path] = field(default_factory=dict)


@pytest.fixture
def world(model_folder: Path, tmp_path: Path) -> World:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    configs = tiny.peft_configs("llama")
    contents, answers = [], {}
    for seed in range(8):
        kind = KINDS[seed % len(KINDS)]
        folder = tiny.save_random_adapter(model, configs[kind], tmp_path / f"content-{seed}", seed)
        tokens = tiny.PeftOracle(model, [(folder, 1.0)]).greedy(
            tokenizer.encode(PROMPT), MAX_TOKENS
        )
        contents.append(folder)
        answers[folder] = tokenizer.decode(tokens)
    assert len(set(answers.values())) == len(contents), "the answers tell contents apart"
    return World(model_folder, tmp_path / "data", contents, answers)


@contextmanager
def process(world: World) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server that takes requests; killed at exit if it is still there."""
    flags = ["--model", str(world.model_folder), "--served-model-name", "tiny", "--port", "0",
             "--data-dir", str(world.data), "--quantization", "none", "--kv-memory", "4MiB",
             "--adapter-memory", "256KiB", "--num-threads", "1"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "server", *flags], stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stderr is not None
            line = next(line for line in started.stderr if "running on" in line)
            threading.Thread(target=started.stderr.read, daemon=True).start()
            with httpx.Client(base_url=line.split("running on ")[1].split()[0], timeout=30) as http:
                end = time.monotonic() + 60
                while http.get("/ready").status_code != 200:
                    assert time.monotonic() < end, "the server did not become ready"
                    time.sleep(0.02)
                yield started, http
        finally:
            started.kill()


def push(http: httpx.Client, name: str, content: Path) -> int:
    files = {f: (file, (content / file).read_bytes()) for f, file in FIELDS.items()}
    return http.post("/v1/adapters", data={"name": name}, files=files).status_code


FIELDS = {"config": CONFIG, "weights": WEIGHTS}


def complete(http: httpx.Client, name: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | {"max_tokens": MAX_TOKENS})


def check(world: World, http: httpx.Client, allowed: dict[str, set[Path | None]]) -> None:
    """Everything acknowledged serves; a name in `allowed` serves one of these, or is not there.
    What is found there counts as acknowledged from now on."""
    names = {a["name"] for a in http.get("/v1/adapters").json()["data"]}
    assert names <= world.acknowledged.keys() | allowed.keys()
    for name in world.acknowledged.keys() | allowed.keys():
        answer = complete(http, name)
        if name not in allowed:
            assert answer.status_code == 200, f"{name} was acknowledged: {answer.text}"
            text = answer.json()["choices"][0]["text"]
            assert text == world.answers[world.acknowledged[name]]
        elif answer.status_code == 404:
            assert None in allowed[name], f"{name} is gone"
            assert name not in names
            world.acknowledged.pop(name, None)
        else:
            assert answer.status_code == 200, answer.text
            text = answer.json()["choices"][0]["text"]
            (content,) = [c for c in allowed[name] if c and world.answers[c] == text]
            world.acknowledged[name] = content


def check_files(world: World, copy: Path) -> None:
    """Registry and store agree: of a copy, so that the server itself finds what the kill left."""
    (root,) = world.data.iterdir()
    shutil.copytree(root, copy)
    store = AdapterStore(copy)
    store.check_integrity()
    store.close()
    shutil.rmtree(copy)


def interrupted(
    world: World, http: httpx.Client, kind: str, chance: random.Random
) -> tuple[Callable[[], None], dict[str, set[Path | None]]]:
    """What is to be killed, and what may be found of it afterwards."""
    new = chance.choice(world.contents)
    name = chance.choice(sorted(world.acknowledged))
    old = world.acknowledged[name]
    match kind:
        case "upload":
            name = f"new-{chance.randrange(1000)}"
            old = world.acknowledged.get(name)  # type: ignore[assignment]
            return lambda: _acknowledge(world, name, new, push(http, name, new)), {name: {old, new}}
        case "flip":
            return lambda: _acknowledge(world, name, new, push(http, name, new)), {name: {old, new}}
        case "delete":
            return lambda: _delete(world, http, name), {name: {old, None}}
        case _:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "n": 4}
            return lambda: http.post("/v1/completions", json=body) and None, {}


def _acknowledge(world: World, name: str, content: Path, status: int) -> None:
    assert status in (200, 201)
    world.acknowledged[name] = content


def _delete(world: World, http: httpx.Client, name: str) -> None:
    assert http.delete(f"/v1/adapters/{name}").status_code == 200
    del world.acknowledged[name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MAX_DELAY))
def test_killed_in_the_middle(world: World, tmp_path: Path, kind: str) -> None:
    chance = random.Random(kind)
    allowed: dict[str, set[Path | None]] = {}
    num_unfinished = 0
    for _ in range(KILLS):
        with process(world) as (started, http):
            check(world, http, allowed)
            for i in range(3):  # never without any
                content = world.contents[i]
                name = f"always-{i}"
                if name not in world.acknowledged:
                    _acknowledge(world, name, content, push(http, name, content))
            work, allowed = interrupted(world, http, kind, chance)
            before = dict(world.acknowledged)

            def attempt(work: Callable[[], None] = work) -> None:
                with suppress(httpx.TransportError):
                    work()

            others = [threading.Thread(target=_ask, args=(http, before)) for _ in range(2)]
            thread = threading.Thread(target=attempt)
            for each in (*others, thread):
                each.start()
            time.sleep(chance.uniform(0, MAX_DELAY[kind]))
            started.kill()
            started.wait()
            for each in (*others, thread):
                each.join()
            if world.acknowledged == before and kind != "generation":
                num_unfinished += 1
            else:  # it was acknowledged in time: then it must be there
                allowed = {}
        check_files(world, tmp_path / "copy")
    with process(world) as (_, http):
        check(world, http, allowed)
    check_files(world, tmp_path / "copy")
    print(f"\n{kind}: {KILLS} kills, {num_unfinished} before the acknowledgement")


def _ask(http: httpx.Client, names: dict[str, Path]) -> None:
    """Requests for other adapters, until the server is gone."""
    with suppress(httpx.TransportError):
        while True:
            for name in names:
                complete(http, name)
