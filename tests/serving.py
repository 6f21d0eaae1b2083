"""A real server around a tiny random model: uvicorn in a thread, on a free port of the loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel

from server.api.app import create_app
from server.api.keys import key_ring
from server.api.lifecycle import Server
from server.engine.engine import StepOutput
from server.runtime import Runtime
from server.settings import Settings
from tests import tiny

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Served:
    """What a test needs of a running server."""

    url: str
    http: httpx.Client
    runtime: Runtime
    model: PreTrainedModel
    folder: Path
    server: Server

    def make_adapter(self, kind: str, seed: int = 0, **changes: Any) -> Path:
        """A folder with a random adapter of one of `tiny.peft_configs`."""
        config = tiny.peft_configs("llama")[kind]
        for name, value in changes.items():
            setattr(config, name, value)
        path = self.folder / f"{kind}-{seed}-{len(list(self.folder.iterdir()))}"
        return tiny.save_random_adapter(self.model, config, path, seed)

    def push(
        self,
        name: str,
        folder: Path,
        *,
        config: bytes | None = None,
        weights: bytes | None = None,
        **more: bytes | None,
    ) -> httpx.Response:
        """Upload a folder's files, or other bytes in their place; more: other fields."""
        config = (folder / CONFIG).read_bytes() if config is None else config
        weights = (folder / WEIGHTS).read_bytes() if weights is None else weights
        files = {"config": (CONFIG, config), "weights": (WEIGHTS, weights)}
        files |= {part: (part, data) for part, data in more.items() if data is not None}
        return self.http.post("/v1/adapters", data={"name": name}, files=files)

    def complete(self, model: str, prompt: str, **fields: Any) -> str:
        """Greedy text."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body | {"max_tokens": 12} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def expected(
        self, prompt: str, parts: Sequence[tuple[Path, float]], num_tokens: int = 12
    ) -> str:
        """What peft alone answers, greedily."""
        oracle = tiny.PeftOracle(self.model, parts)
        ids = self.runtime.tokenizer.encode(prompt)
        num_prompt = len(ids)
        for _ in range(num_tokens):
            ids.append(int(torch.argmax(oracle.logits(ids)[-1])))
        return self.runtime.tokenizer.decode(ids[num_prompt:])

    def slow_down(self, seconds: float) -> None:
        """Make every step take at least so long from now on; with 0 as long as it takes."""
        engine = self.runtime.engine

        def step() -> list[StepOutput]:
            time.sleep(seconds)
            return type(engine).step(engine)

        engine.step = step  # type: ignore[method-assign]

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until the engine has nothing to do, and check its pools."""
        end = time.monotonic() + seconds
        while self.runtime.engine.live:
            assert time.monotonic() < end, "the engine is still busy"
            time.sleep(0.005)
        self.runtime.check_integrity()


@contextmanager
def listen(load: Callable[[], Runtime], settings: Settings) -> Iterator[tuple[Server, str]]:
    """Run the application in a thread, whether its runtime is loaded yet or not; its URL."""
    server = Server(create_app(load, settings, key_ring(settings)), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serve(folder: Path, model: PreTrainedModel | None = None, **settings: Any) -> Iterator[Served]:
    """Start a server whose data lie in `folder`, of a tiny llama by default; stop it at exit."""
    model = tiny.llama() if model is None else model
    runtime = tiny.runtime(model, folder / "data", **settings)
    with listen(lambda: runtime, tiny.settings(folder / "data", **settings)) as (server, url):
        adapters = folder / "adapters"
        adapters.mkdir()
        with httpx.Client(base_url=url, timeout=60) as http:
            while http.get("/ready").status_code != 200:
                time.sleep(0.01)
            yield Served(url, http, runtime, model, adapters, server)


__all__ = ["CONFIG", "WEIGHTS", "Served", "listen", "serve"]
