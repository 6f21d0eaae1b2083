"""AdapterHub's bottleneck adapters in a mixed batch compute what `adapters` computed alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.peftcore import make_adapterhub_fixtures as original
from tests.peftcore.hub import hub
from tests.recorder import Recorder, compare


class Alone:
    """A model on one sequence; adapters of ours equal `adapters`, as the tests of peftcore show."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([list(token_ids)])).logits[0]


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3"])
def test_a_mixed_batch_is_what_each_row_is_alone(model: str, tmp_path: Path) -> None:
    """Every kind of bottleneck beside LoRA on the modules that they wrap and the base, prompts in
    chunks, two rounds of which the second finds the first's prefixes."""
    world = hub(model)
    base = world.base()
    runtime = tiny.runtime(
        base, tmp_path / "data", max_num_batched_tokens=16, max_num_seqs=40, block_size=4
    )
    folders: dict[str, Path] = {}
    oracles = {"tiny": Alone(world.base())}
    for case in world.cases:
        folders[case] = world.save(case, tmp_path / case)
        oracles[case] = Alone(PeftModel.from_pretrained(world.base(), folders[case]))
        config = (folders[case] / "adapter_config.json").read_bytes()
        runtime.adapters.register(case, config, folders[case] / "adapter.safetensors")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=2)
    made = get_peft_model(world.base(), lora)
    made.save_pretrained(tmp_path / "lora")
    oracles["lora"] = Alone(made)
    tiny.register(runtime, "lora", tmp_path / "lora")

    recorder = Recorder(runtime)
    ids = original.batch(model)["input_ids"]
    for round_ in range(2):
        sequences = []
        for i, name in enumerate(oracles):
            prompt = [*ids[2].tolist(), *ids[i % 2].tolist()[: 2 + i % 5], *[5] * round_]
            with runtime.adapters.lease(name) as lease:
                sequences.append((recorder.add(f"{name}-{round_}", prompt, lease, 6), name))
            if i % 3 == 0:
                recorder.engine.step()
        recorder.run()
        for seq, name in sequences:
            assert compare(recorder, seq, oracles[name]) < 1e-4, name
    assert all(seq.num_cached for seq, _ in sequences), "a prefix is not shared"

    exact = {}
    for case in world.cases:
        with runtime.adapters.lease(case) as lease:
            seq = recorder.add(f"exact-{case}", ids[0].tolist(), lease, 1)
        exact[case] = seq
    recorder.run()
    for case, seq in exact.items():
        got = recorder.logits[seq.key][0]
        torch.testing.assert_close(got, world.expected(case)[0, -1], atol=1e-5, rtol=0)
    runtime.check_integrity()
    runtime.close()
