"""Joint training by Triton's kernels: the losses and adapters of torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import (
    AdapterConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peftcore.ops import VARIABLE
from peftcore.train.joint import Job, JointTrainer
from tests import tiny

CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.3, task_type="CAUSAL_LM"
    ),
    "dora": LoraConfig(
        r=17, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM"
    ),
    "ia3": IA3Config(
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "head": LoraConfig(r=2, target_modules=["lm_head", "o_proj"], task_type="CAUSAL_LM"),
}
STEPS = 4


def rows_of(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 256, (n,), generator=generator) for n in (5, 11, 7, 8)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def state_of(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name in CONFIGS
        for key, value in get_peft_model_state_dict(model, None, name).items()
    }


def trained(
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name; the adapters before and after."""
    torch.manual_seed(0)
    names = iter(CONFIGS)
    first = next(names)
    base = tiny.llama(num_hidden_layers=1).to(device)
    model = get_peft_model(base, CONFIGS[first], adapter_name=first)
    for name in names:
        model.add_adapter(name, CONFIGS[name])
    jobs = [
        Job(
            adapter_name=name, dataset=rows_of(i), learning_rate=2e-2, batch_size=2,
            max_steps=STEPS,
        )
        for i, name in enumerate(CONFIGS)
    ]  # fmt: skip
    before = state_of(model)
    trainer = JointTrainer(model, jobs)
    for _ in trainer.train():
        pass
    return {name: p.losses for name, p in trainer.progress.items()}, before, state_of(model)


def test_losses_and_adapters_are_torchs(
    ops: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = ops.adapt_back_

    def counted(*given: Any) -> Any:
        calls.append(len(given[3]))
        return compute(*given)

    monkeypatch.setattr(ops, "adapt_back_", counted)
    monkeypatch.setenv(VARIABLE, "torch")
    expected, before, wanted = trained(device)
    assert not calls
    monkeypatch.setenv(VARIABLE, "triton")
    losses, _, found = trained(device)
    assert len(calls) == 5 * STEPS  # q, v, o, down and the head; several parts at most of them
    assert max(calls) == 2
    for name, values in expected.items():
        assert losses[name] == pytest.approx(values, abs=2e-5)
        assert len(values) == STEPS
    for key, value in wanted.items():
        is_trained = "base_layer" not in key  # the head's own weight is in the file beside it
        assert torch.equal(value, before[key]) != is_trained, key
        torch.testing.assert_close(found[key], value, atol=2e-4, rtol=1e-3, msg=key)
