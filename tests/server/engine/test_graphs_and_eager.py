"""A server with graphs answers as one without: on a GPU by CUDA's (POLYPEFT_TEST_DEVICE=cuda),
elsewhere by recorded launches."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.ops import VARIABLE
from server import build
from server.engine.step_graphs import Captured
from tests import tiny
from tests.recorder import Recorder

pytest.importorskip("triton", reason="there is no triton for this platform")
DEVICE = os.environ.get("POLYPEFT_TEST_DEVICE", "cpu")
if DEVICE == "cpu" and torch.cuda.is_available():
    pytest.skip("runs with POLYPEFT_TEST_DEVICE=cuda", allow_module_level=True)

NAMES = ("lora-r8-all", "dora", "prefix", "ia3")


@pytest.fixture(autouse=True)
def _captures(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        from tests.server.engine import tape

        monkeypatch.setenv(VARIABLE, "triton")
        monkeypatch.setattr(build, "wants_graphs", lambda settings, device: settings.cuda_graphs)
        monkeypatch.setattr(build, "CudaCapture", lambda: tape.capture)


def runtime_of(folder: Path, **changes: Any) -> Any:
    model = tiny.llama(num_hidden_layers=1)
    runtime = tiny.runtime(
        model, folder / "data", max_num_seqs=3, max_num_batched_tokens=24, **changes
    )
    configs = tiny.peft_configs("llama")
    for seed, name in enumerate(NAMES):
        path = tiny.save_random_adapter(model, configs[name], folder / name, seed)
        tiny.register(runtime, name, path)
    return runtime


def answers(folder: Path, **changes: Any) -> tuple[dict[str, list[int]], dict[str, Tensor], int]:
    """Tokens and logits of requests that come and go, and how many steps were replayed."""
    runtime = runtime_of(folder, **changes)
    recorder, rng, sequences = Recorder(runtime), random.Random(4), []
    recorder.load(*NAMES)
    for i in range(6):
        name = ("tiny", *NAMES)[i % 5]
        with runtime.adapters.lease(name) as lease:
            prompt = [rng.randrange(256) for _ in range(rng.randint(1, 6))]
            sequences.append(recorder.add(f"{name}-{i}", prompt, lease, max_tokens=3 + i % 2))
        recorder.engine.step()  # its prompt
        recorder.engine.step()
    recorder.run()
    runtime.check_integrity()
    graphs = runtime.engine.runner.graphs
    runtime.close()
    return (
        {seq.key[0]: seq.output_token_ids for seq in sequences},
        {seq.key[0]: torch.stack(recorder.logits[seq.key]) for seq in sequences},
        0 if graphs is None else graphs.num_replays,
    )


def test_answers_are_the_same(tmp_path: Path) -> None:
    tokens, logits, num_replays = answers(tmp_path / "graphs", cuda_graph_max_seqs=2)
    expected, eager, none = answers(tmp_path / "eager", cuda_graphs=False)
    assert num_replays > 2
    assert none == 0
    assert tokens == expected
    for name, rows in logits.items():
        torch.testing.assert_close(rows, eager[name], atol=1e-4, rtol=1e-4)


def test_a_step_that_cannot_be_captured_is_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: Any) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(build, "CudaCapture", lambda: fail)
    with caplog.at_level(logging.WARNING):
        runtime = runtime_of(tmp_path)
    assert runtime.engine.runner.graphs is None
    assert "no CUDA graphs: the model's step cannot be captured: operation not" in caplog.text
    runtime.close()
