"""An engine whose adapters are computed by Triton: every request as HF peft alone computes it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftcore.ops import VARIABLE
from peftcore.ops.cpu import kernels
from tests import tiny
from tests.recorder import Recorder, compare


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="there is no triton for this platform")
    monkeypatch.setenv(VARIABLE, "triton")


def _registered(model: Any, folder: Path, **changes: Any) -> tuple[Any, dict[str, Path]]:
    runtime = tiny.runtime(model, folder / "data", **changes)
    paths: dict[str, Path] = {}
    for seed, (name, config) in enumerate(tiny.peft_configs(model.config.model_type).items()):
        paths[name] = tiny.save_random_adapter(model, config, folder / name, seed)
        tiny.register(runtime, name, paths[name])
    return runtime, paths


def test_all_methods_in_one_batch(tmp_path: Path) -> None:
    """Beside the base, a mixture and a weighted adapter; prompts, then decoding."""
    from peftcore.ops import triton

    model = tiny.llama(num_hidden_layers=2)
    runtime, paths = _registered(model, tmp_path, max_num_batched_tokens=512, max_num_seqs=64)
    host = runtime.engine.runner.loaded.host
    assert host.kernels is triton
    assert host.kernels is not kernels()
    recorder = Recorder(runtime)
    mixture = [("lora-r4", 0.75), ("lora-r8-all", 0.5), ("lora-r16-rslora", -0.5)]
    requests = [(name, [(name, 1.0)]) for name in paths]
    requests += [("tiny", []), ("mixture", mixture), ("half", [("lora_bias", 0.5)])]
    rng, sequences = random.Random(0), []
    for label, parts in requests:
        mixed = label in ("mixture", "half")
        lease = runtime.adapters.lease("tiny", parts) if mixed else runtime.adapters.lease(label)
        with lease:
            prompt = [rng.randrange(256) for _ in range(rng.randint(2, 12))]
            sequences.append((recorder.add(label, prompt, lease, max_tokens=2), parts))
    recorder.run()
    for seq, parts in sequences:
        oracle = tiny.PeftOracle(model, [(paths[name], weight) for name, weight in parts])
        assert compare(recorder, seq, oracle) < 1e-4, seq.key
    assert max(len({c.seq.cache_seed for c in b.chunks}) for b in recorder.batches) >= 10
    runtime.check_integrity()
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_tests_of_parity(architecture: str) -> None:
    """The same file that the CPU's kernels pass: chunked prompts, cached prefixes, 25 adapters."""
    file = Path(__file__).with_name("test_parity.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file),
         "-k", architecture],
        cwd=Path(__file__).parents[3], env=os.environ | {VARIABLE: "triton"}, timeout=7200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout
