"""Packed rows of several sequences: each is computed as it is alone, or the base is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from peftcore import LoraConfig, PromptTuningConfig, UnsupportedError, get_peft_model
from peftcore.train.joint import JointTrainer
from peftcore.train.packed import Sample, computing, logits_of, pack
from tests import tiny
from tests.peftcore.worlds import quiet

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "sliding_window": 4,
    "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip


def gemma2() -> PreTrainedModel:
    """Soft caps and sliding windows."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    )
    return Gemma2ForCausalLM(config).eval()


def gpt_oss() -> PreTrainedModel:
    """Attention sinks and sliding windows."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return GptOssForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make", [tiny.llama, tiny.gpt2, tiny.gemma3, gemma2, gpt_oss], ids=lambda f: f.__name__
)
def test_packed_rows_are_what_each_sequence_is_alone(make: Callable[[], PreTrainedModel]) -> None:
    config = PromptTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM")
    model = get_peft_model(make(), config).eval()
    base = model.get_base_model()
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 256, (n,), generator=generator) for n in (9, 6, 17, 12, 7, 40)]
    with torch.no_grad(), model.disable_adapter():
        batch = pack(model, [("z", Sample(i, i)) for i in ids], [None] * len(ids))
        with computing(model, batch):
            got = logits_of(model, batch)
        expected = [base(input_ids=i[None]).logits[0, :-1] for i in ids]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert base.config._attn_implementation in ("sdpa", "eager")


def recurrent_gemma() -> PreTrainedModel:
    config = RecurrentGemmaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=300,
        lru_width=32,
    )  # fmt: skip
    return RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize("make", [tiny.bert, recurrent_gemma], ids=["bert", "recurrent-gemma"])
def test_bases_whose_rows_mix_are_refused(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet():
        model = get_peft_model(make(), config)
        with pytest.raises(UnsupportedError, match="model"):
            JointTrainer(model)
