"""What only a GPU can show: POLYPEFT_TEST_DEVICE=cuda, in `make gpu-check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.copies import StreamCopies
from tests import tiny
from tests.recorder import Recorder

if os.environ.get("POLYPEFT_TEST_DEVICE", "cpu") == "cpu":
    pytest.skip("needs a GPU: POLYPEFT_TEST_DEVICE=cuda", allow_module_level=True)

DEVICE = torch.device(os.environ["POLYPEFT_TEST_DEVICE"])
#: Of the clock of the card, about a tenth of a second.
CYCLES = 200_000_000


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_waits_for_nothing(tmp_path: Path, cuda_graphs: bool) -> None:
    """torch raises where the host waits for the device, while the runner computes a step."""
    model = tiny.llama(num_hidden_layers=2)
    runtime = tiny.runtime(model, tmp_path / "data", max_num_seqs=4, cuda_graphs=cuda_graphs)
    configs = tiny.peft_configs("llama")
    for seed, name in enumerate(("lora-r8-all", "dora")):
        path = tiny.save_random_adapter(model, configs[name], tmp_path / name, seed)
        tiny.register(runtime, name, path)
    runner = runtime.engine.runner
    execute, num_steps = runner.execute, 0

    def strict(batch: Any) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        if num_steps <= 8:  # what is compiled or made at a first step may wait
            return execute(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.execute = strict  # type: ignore[method-assign]
    recorder = Recorder(runtime)
    for round_ in range(3):
        for name in ("tiny", "lora-r8-all", "dora"):
            with runtime.adapters.lease(name) as lease:
                recorder.add(f"{name}-{round_}", [1, 2, 3, 4, round_], lease, max_tokens=6)
        recorder.run()
    assert num_steps > 12
    assert (runner.graphs is not None) is cuda_graphs
    runtime.close()


def test_a_copy_comes_between_the_reads_around_it() -> None:
    """Behind a read and a zeroing that are still queued, before a read that joins it."""
    copies = StreamCopies(DEVICE)
    arena = torch.full((1 << 20,), 1.0, device=DEVICE)
    source = torch.full((1 << 20,), 2.0).pin_memory()
    torch.cuda._sleep(CYCLES)
    before = arena.clone()
    arena.zero_()
    after = copies.mark()
    copied = copies.copy(arena, source, after)
    copies.join(copied)
    behind = arena.clone()
    assert (before == 1).all()
    assert (behind == 2).all()


def test_a_copy_does_not_wait_for_a_step_that_has_nothing_to_do_with_it() -> None:
    copies = StreamCopies(DEVICE)
    arena = torch.zeros(1 << 20, device=DEVICE)
    source = torch.ones(1 << 20).pin_memory()
    after = copies.mark()
    torch.cuda._sleep(CYCLES)
    running = torch.cuda.current_stream(DEVICE).record_event()
    copies.copy(arena, source, after)
    assert not running.query(), "the copy came behind the step"
    torch.cuda.synchronize(DEVICE)
    assert arena.all()
