"""An engine in this process, without HTTP: for benchmarks of the step itself."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.adapters import make_lora
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from peftcore.sources.resolve import resolve_model
from server.build import build_runtime
from server.engine.engine import Engine
from server.engine.sequence import AdapterUse, SamplingParams
from server.engine.sequence import Sequence as EngineSequence
from server.settings import Settings

#: Steps after which a run is given up: no benchmark's engine may loop.
_MAX_STEPS = 100_000


@dataclass(frozen=True)
class Run:
    """One batch of streams from admission to the last token.

    Attributes:
        seconds: of the whole run.
        decode_steps: seconds of each step in which every stream got one token.
    """

    num_output_tokens: int
    seconds: float
    decode_steps: Sequence[float]

    @property
    def tokens_per_second(self) -> float:
        return self.num_output_tokens / self.seconds


@dataclass(frozen=True)
class InProcess:
    """The engine, and the digests of the LoRA adapters that are registered and resident."""

    engine: Engine
    digests: Sequence[str]
    vocab_size: int

    def run(
        self, *, streams: int, prompt_tokens: int, output_tokens: int, adapters: bool, seed: int
    ) -> Run:
        """Greedy generation of `streams` requests at once; stream i has adapter i, or none has."""
        rng = random.Random(seed)
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        sequences = [
            EngineSequence(
                (f"{seed}-{i}", 0),
                [rng.randrange(self.vocab_size // 2) for _ in range(prompt_tokens)],
                params,
                adapters=(AdapterUse(self.digests[i % len(self.digests)]),) if adapters else (),
                max_len=prompt_tokens + output_tokens,
            )
            for i in range(streams)
        ]
        start = time.perf_counter()
        self.engine.add(*sequences)
        decode_steps = []
        for _ in range(_MAX_STEPS):
            if not self.engine.has_work:
                break
            begun = time.perf_counter()
            decoding = all(seq.num_output_tokens > 0 for seq in sequences)
            outputs = self.engine.step()
            if decoding and len(outputs) == streams:
                decode_steps.append(time.perf_counter() - begun)
            if not outputs and not self.engine.scheduler.running:
                time.sleep(0.001)  # adapters are loading
        return Run(streams * output_tokens, time.perf_counter() - start, decode_steps)


@contextmanager
def in_process(settings: dict[str, object], *, num_adapters: int, rank: int) -> Iterator[InProcess]:
    """A runtime whose engine is driven by the caller, with adapters registered."""
    with tempfile.TemporaryDirectory() as scratch:
        runtime = build_runtime(Settings(data_dir=Path(scratch) / "data", **settings))  # type: ignore[arg-type]
        try:
            model = settings.get("model")
            folder = resolve_model(None if model is None else str(model)).path
            digests = []
            for seed in range(num_adapters):
                files = make_lora(folder, Path(scratch) / "one", rank=rank, seed=seed)
                config = (files / CONFIG_NAME).read_bytes()
                info, _ = runtime.adapters.register(f"lora-{seed}", config, files / WEIGHTS_NAME)
                digests.append(info.digest)
            vocab_size = int(runtime.facts["vocab_size"])
            yield InProcess(runtime.engine, digests, vocab_size)
        finally:
            runtime.engine.cache.close()
            runtime.adapters.close()
