"""An engine whose attention is Triton's: transformers' own tokens, and torch's, step by step."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import ops
from peftcore.ops import VARIABLE, uses_triton
from server.models import attention
from server.models.attention import NAME, TORCH_NAME
from server.models.loader import prepare_model
from tests import tiny
from tests.recorder import Recorder
from tests.server.models import zoo

CPU = torch.device("cpu")


def choose(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """triton, or torch without any kernel; what is not chosen fails the test."""

    def other(*args: object, **kwargs: object) -> Tensor:
        pytest.fail(f"{choice} is to attend")

    monkeypatch.setenv(VARIABLE, choice)
    if choice == "triton":
        monkeypatch.setattr(attention, "attend", other)
        monkeypatch.setattr(attention, "_attend_by_torch", other)
    else:
        monkeypatch.setattr(attention, "attend", other)
        monkeypatch.setattr(attention, "_attend_by_triton", other)


@pytest.fixture
def interpreter() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("Triton is to run tensors on a CPU here, by its interpreter")


def greedy(model: Any, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Steps mix decodes and chunks of prompts; the last prompt begins as the first does."""
    runtime = tiny.runtime(model, folder, max_num_batched_tokens=24)
    recorder, sequences = Recorder(runtime), []
    for i, prompt in enumerate(prompts):
        with runtime.adapters.lease("tiny") as lease:
            sequences.append(recorder.add(str(i), prompt, lease, max_tokens=5))
        recorder.engine.step()
    recorder.run()
    kinds = [{chunk.num_tokens > 1 for chunk in batch.chunks} for batch in recorder.batches]
    assert {True, False} in kinds
    assert sequences[-1].num_cached >= 8
    runtime.check_integrity()
    runtime.close()
    return [list(seq.output_token_ids) for seq in sequences]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreter: None
) -> None:
    model = tiny.llama() if name == "llama" else tiny.gemma3()  # which has windows of 16
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (34, 3, 19, 1)]
    prompts.append(prompts[0][:20])
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        expected.append(found[0, len(prompt) :].tolist())
    for choice in ("triton", "torch"):
        with monkeypatch.context() as patch:
            choose(patch, choice)
            assert greedy(model, tmp_path / choice, prompts) == expected, choice


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "deepseek_v3", "bert"])
def test_the_start_up_probe_passes(
    name: str, monkeypatch: pytest.MonkeyPatch, interpreter: None
) -> None:
    """It compares with the model's eager attention: softcap, sinks, values of another size, rows
    that see their whole sequence."""
    choose(monkeypatch, "triton")
    model = zoo.make_encoder(name) if name in zoo.ENCODERS else zoo.make(name)
    loaded = prepare_model(model, "none", CPU)
    assert loaded.model.config._attn_implementation == NAME


def test_torch_attends_where_triton_answers_wrongly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interpreter: None
) -> None:
    from peftcore.ops.triton import attention as kernel

    monkeypatch.setenv(VARIABLE, "triton")
    right = kernel.attend
    monkeypatch.setattr(kernel, "attend", lambda *args: right(*args) * 1.01)
    with caplog.at_level(logging.WARNING):
        loaded = prepare_model(zoo.make("llama"), "none", CPU)  # raises if torch's is wrong too
    assert "torch attends in Triton's place" in caplog.text
    assert loaded.model.config._attn_implementation == TORCH_NAME


# -- who attends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "device", "capability", "expected"),
    [
        (None, "cpu", None, False),
        (None, "cuda", (9, 0), True),
        (None, "cuda", (7, 5), False),
        ("torch", "cuda", (9, 0), False),
        ("cpu", "cpu", None, False),
        ("triton", "cpu", None, True),
        ("triton", "cuda", (7, 5), True),
    ],
)
def test_who_attends(
    choice: str | None, device: str, capability: tuple[int, int] | None, expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if choice is not None:
        monkeypatch.setenv(VARIABLE, choice)
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ops, "_compiles_for", ops._compiles_for.__wrapped__)
    assert uses_triton(torch.device(device)) is expected


def test_what_is_asked_for_and_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on a CPU it needs TRITON_INTERPRET=1"):
        uses_triton(CPU)
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    monkeypatch.setattr(ops, "_compiles_for", ops._compiles_for.__wrapped__)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        uses_triton(CPU)
    monkeypatch.delenv(VARIABLE)
    assert not uses_triton(torch.device("cuda")), "torch attends on a GPU without Triton"
