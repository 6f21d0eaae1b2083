"""Primitives that replace or rotate, on whole models against peft's own layers.

The programs are written here by hand from peft's modules, so that no method's compilation stands
between the primitive and its original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from peftcore.arena import AdapterArena
from peftcore.base import BaseModel
from peftcore.branches import branches_of, known_model_types
from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import ConfigError
from peftcore.layers import AdapterBatch, AdapterHost, AdapterModule, Segment, attach
from peftcore.packing import BoundAdapter, bind, pack, packed_size
from peftcore.primitives import (
    BiasDelta,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    OutputScale,
    Primitive,
    RowOverride,
)
from peftcore.program import AdapterProgram, check_fits, compile_adapter, surface_of
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.worlds import quiet

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gemma3": tiny.gemma3,
}
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gemma3": ["q_proj", "o_proj"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "gemma3": "embed_tokens"}
NORMS = {
    "llama": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "gemma3": ["q_norm", "k_norm", "post_feedforward_layernorm", "norm"],
}
FINAL_NORM = {"llama": "model.norm", "gpt2": "ln_f", "gemma3": "model.norm"}
#: Of `IDS` and of others, in no order.
CHOSEN = [9, 1, 250, 4]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def configs(model: str) -> dict[str, peft.PeftConfig]:
    attention, embedding = ATTENTION[model], EMBEDDING[model]

    def lora(**options: object) -> peft.PeftConfig:
        return peft.LoraConfig(**({"r": 3, "target_modules": attention} | options))

    found = {
        "norms": peft.LNTuningConfig(target_modules=NORMS[model]),
        "tokens": peft.TrainableTokensConfig(token_indices=CHOSEN, target_modules=[embedding]),
        "lora-tokens": lora(trainable_token_indices={embedding: CHOSEN}),
        "lora-saved": lora(modules_to_save=["lm_head", FINAL_NORM[model], embedding]),
        "lora-embedding": lora(target_modules=[*attention, embedding, "lm_head"], lora_alpha=7),
    }
    if model == "llama":  # an untied head may have rows of its own
        head = {embedding: CHOSEN, "lm_head": [0, 299, 9]}
        found["lora-head-rows"] = lora(trainable_token_indices=head)
    if model == "gpt2":
        found["lora-positions"] = lora(target_modules=["wpe"], modules_to_save=["wte"])
    else:  # peft's OFT knows no Conv1D
        found["oft"] = peft.OFTConfig(
            oft_block_size=8, target_modules=[*attention, "down_proj"], use_cayley_neumann=False
        )
        found["oft-shared"] = peft.OFTConfig(
            oft_block_size=16, target_modules=[*attention, "lm_head"], block_share=True
        )
    return found


def in_peft(model: PreTrainedModel, config: peft.PeftConfig, seed: int) -> peft.PeftModel:
    """A copy of the model with an adapter by peft, all of whose parameters matter."""
    with quiet():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return wrapped.eval()


@torch.no_grad()
def primitives_of(wrapped: peft.PeftModel) -> list[Primitive]:
    """What peft's layers hold."""
    found: list[Primitive] = []
    for name, module in wrapped.named_modules():
        path = name.removeprefix("base_model.model.").removesuffix(".token_adapter")
        match module:
            case LNTuningLayer():
                own = module.ln_tuning_layers["default"]
                found.append(ModuleOverride(path, own.weight, getattr(own, "bias", None)))
            case ModulesToSaveWrapper():
                own = module.modules_to_save["default"]
                found.append(ModuleOverride(path, own.weight, getattr(own, "bias", None)))
            case TrainableTokensLayer():
                owner = module.tied_adapter or module
                rows = owner.trainable_tokens_delta["default"]
                found.append(RowOverride(path, tuple(owner.token_indices["default"]), rows))
            case LoraLayer():
                if "default" in module.lora_embedding_A:
                    a, b = module.lora_embedding_A, module.lora_embedding_B
                    pair = a["default"], b["default"]
                else:
                    pair = module.lora_A["default"].weight, module.lora_B["default"].weight
                found.append(LowRank(path, *pair, module.scaling["default"]))
            case OFTLayer():
                rotation = module.oft_R["default"]
                blocks = rotation._cayley_batch(
                    rotation.weight, rotation.block_size, rotation.use_cayley_neumann
                )
                num_blocks = module.in_features // rotation.block_size
                found.append(InputRotation(path, blocks.expand(num_blocks, -1, -1)))
    return found


def bound(primitives: Sequence[Primitive], digest: str = "d") -> BoundAdapter:
    """Through an arena that holds exactly this, as the server has it."""
    program = AdapterProgram(digest, "ANY", primitives)
    arena = AdapterArena(packed_size(program).num_bytes(torch.float32), torch.uint8)
    packed = pack(program, torch.float32)
    offset = arena.allocate(len(packed.data))
    assert offset == 0
    assert arena.num_free == 0
    arena.data.copy_(packed.data)
    return bind(digest, packed.layout, arena.data, offset)


def attached(model: PreTrainedModel) -> tuple[PreTrainedModel, AdapterHost]:
    model = copy.deepcopy(model)
    return model, attach(model, BaseModel.from_model(model))


@dataclass
class Case:
    """A model, an adapter by peft on it, and the same as primitives."""

    model: PreTrainedModel
    original: peft.PeftModel
    primitives: list[Primitive]

    @classmethod
    def make(cls, model: str, name: str, seed: int = 0) -> Case:
        plain = MODELS[model]()
        original = in_peft(plain, configs(model)[name], seed)
        return cls(plain, original, primitives_of(original))

    @torch.inference_mode()
    def expected(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self.original(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits


CASES = [(model, name) for model in MODELS for name in configs(model)]


@pytest.mark.parametrize(("model", "name"), CASES)
@torch.inference_mode()
def test_logits_are_pefts(model: str, name: str) -> None:
    case = Case.make(model, name)
    check_fits(case.primitives, BaseModel.from_model(case.model))
    served, host = attached(case.model)
    segment = Segment(0, len(IDS), bound(case.primitives))
    host.batch = AdapterBatch([segment], [segment])
    expected = case.expected(IDS)
    torch.testing.assert_close(served(torch.tensor([IDS])).logits[0], expected, atol=1e-4, rtol=0)
    plain = case.model(torch.tensor([IDS])).logits[0]
    assert (expected - plain).abs().max() > 0.05
    host.batch = AdapterBatch()
    assert torch.equal(served(torch.tensor([IDS])).logits[0], plain)


def test_the_cases_hold_what_they_are_for() -> None:
    """In particular: a tied head gets the rows of its embedding."""
    held = {
        (model, name): {(type(p), p.module.rpartition(".")[2]) for p in primitives}
        for model, name in CASES
        for primitives in [Case.make(model, name).primitives]
    }
    for model in ("gpt2", "gemma3"):
        for name in ("tokens", "lora-tokens"):
            assert held[model, name] >= {
                (RowOverride, "lm_head"), (RowOverride, EMBEDDING[model]),
            }  # fmt: skip
    assert held["llama", "tokens"] == {(RowOverride, "embed_tokens")}
    assert held["llama", "lora-head-rows"] >= {(RowOverride, "lm_head"), (LowRank, "q_proj")}
    for model, embedding in EMBEDDING.items():
        assert {k for k, _ in held[model, "norms"]} == {ModuleOverride}
        assert held[model, "lora-saved"] >= {
            (ModuleOverride, "lm_head"), (ModuleOverride, embedding),
            (ModuleOverride, FINAL_NORM[model].rpartition(".")[2]),
        }  # fmt: skip
        assert held[model, "lora-embedding"] >= {(LowRank, embedding), (LowRank, "lm_head")}
    assert (LowRank, "wpe") in held["gpt2", "lora-positions"]
    assert (InputRotation, "lm_head") in held["gemma3", "oft-shared"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lens", [[5, 1, 7, 2, 11, 3, 4], [1, 1, 1, 1]], ids=["many", "as heads"])
@torch.inference_mode()
def test_packed_with_others_each_gets_its_own(model: str, lens: list[int]) -> None:
    """Sequences of the base and of every adapter in one batch, in two orders."""
    cases = [Case.make(model, name, seed) for seed, name in enumerate(configs(model))]
    adapters = [bound(case.primitives, f"d{i}") for i, case in enumerate(cases)]
    served, host = attached(cases[0].model)
    for shift in (0, 3):
        generator = torch.Generator().manual_seed(shift)
        owners = [(i + shift) % (len(cases) + 1) for i in range(len(lens))]  # the last: the base
        prompts = [torch.randint(0, 12, (n,), generator=generator).tolist() for n in lens]
        segments, start = [], 0
        for owner, n in zip(owners, lens, strict=True):
            if owner < len(cases):
                segments.append(Segment(start, start + n, adapters[owner]))
            start += n
        host.batch = AdapterBatch(segments, segments)
        logits = packed_logits(served, prompts).split(lens)
        for owner, prompt, got in zip(owners, prompts, logits, strict=True):
            if owner < len(cases):
                expected = cases[owner].expected(prompt)
            else:
                expected = cases[0].model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def packed_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of one packed batch `[1, rows]` in which sequences do not see each other."""
    blocks = [torch.ones(len(p), len(p)).tril() for p in prompts]
    visible = torch.block_diag(*blocks).bool()
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    masks = mask
    if model.config.model_type.startswith("gemma3"):  # its window is longer than any prompt
        masks = {"full_attention": mask, "sliding_attention": mask}  # type: ignore[assignment]
    positions = torch.cat([torch.arange(len(p)) for p in prompts])[None]
    ids = torch.tensor([[i for p in prompts for i in p]])
    logits: Tensor = model(
        input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False
    ).logits[0]
    return logits


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@torch.inference_mode()
def test_overrides_stand_in_for_every_quantized_layer(quantization: str) -> None:
    """With the float weights in every linear's place the quantized model is the float one."""
    plain = tiny.llama()
    float_base = BaseModel.from_model(plain)
    quantized = copy.deepcopy(plain)
    quantize_model(quantized, quantization)  # type: ignore[arg-type]
    base = BaseModel.from_model(quantized)
    host = attach(quantized, base)
    overrides = [
        ModuleOverride(m.path, m.weight(), m.bias())
        for m in float_base.modules.values()
        if m.is_linear
    ]
    check_fits(overrides, base)
    segment = Segment(2, len(IDS), bound(overrides))
    host.batch = AdapterBatch([Segment(0, len(IDS), segment.adapter)], [segment])
    ids = torch.tensor([IDS])
    logits, expected = quantized(ids).logits[0], plain(ids).logits[0]
    torch.testing.assert_close(logits[2:], expected[2:], atol=1e-4, rtol=0)
    assert (logits[:2] - expected[:2]).abs().max() > 1e-3


# -- what does not fit ---------------------------------------------------------------------------


def t(*shape: int) -> Tensor:
    return torch.zeros(shape)


Q, NORM, EMB = "model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens"
MISFITS: list[Primitive] = [
    LowRank("model.layers.9.self_attn.q_proj", t(2, 64), t(64, 2), 1.0),
    LowRank("model.layers.0", t(2, 64), t(64, 2), 1.0),
    LowRank(Q, t(2, 64), t(65, 2), 1.0),
    LowRank(Q, t(2, 63), t(64, 2), 1.0),
    LowRank(Q, t(2, 64), t(64, 3), 1.0),
    LowRank(EMB, t(2, 64), t(tiny.VOCAB, 2), 1.0),
    LowRank(NORM, t(2, 64), t(64, 2), 1.0),
    InputRotation(Q, t(8, 8, 9)),
    InputRotation(Q, t(7, 8, 8)),
    InputRotation(EMB, t(8, 8, 8)),
    InputScale(Q, t(65)),
    InputScale(NORM, t(64)),
    OutputScale(Q, t(32)),
    OutputScale(EMB, t(64)),
    BiasDelta(EMB, t(64)),
    BiasDelta(NORM, t(63)),
    ModuleOverride(Q, t(64, 63), t(64)),
    ModuleOverride(Q, t(64, 64), t(63)),
    ModuleOverride(NORM, t(63), None),
    ModuleOverride(NORM, t(64), t(64)),
    ModuleOverride(EMB, t(tiny.VOCAB + 1, 64), None),
    ModuleOverride(EMB, t(tiny.VOCAB, 64), t(64)),
    RowOverride(EMB, (1, 2), t(3, 64)),
    RowOverride(EMB, (1, 1), t(2, 64)),
    RowOverride(EMB, (tiny.VOCAB,), t(1, 64)),
    RowOverride(EMB, (-1,), t(1, 64)),
    RowOverride(EMB, (), t(0, 64)),
    RowOverride(EMB, (1,), t(1, 63)),
    RowOverride("lm_head", (tiny.VOCAB,), t(1, 64)),
    RowOverride(NORM, (1,), t(1, 64)),
]
FITTING: list[Primitive] = [
    LowRank(Q, t(2, 64), t(64, 2), 1.0),
    LowRank(EMB, t(2, tiny.VOCAB), t(64, 2), 1.0),
    InputRotation(Q, t(8, 8, 8)),
    InputScale(Q, t(64)),
    OutputScale(Q, t(64)),
    BiasDelta(NORM, t(64)),
    BiasDelta("lm_head", t(tiny.VOCAB)),
    ModuleOverride(Q, t(64, 64), None),
    ModuleOverride("lm_head", t(tiny.VOCAB, 64), t(tiny.VOCAB)),
    ModuleOverride(NORM, t(64), None),
    ModuleOverride(EMB, t(tiny.VOCAB, 64), None),
    RowOverride(EMB, (tiny.VOCAB - 1, 0), t(2, 64)),
    RowOverride("lm_head", (tiny.VOCAB - 1, 0), t(2, 64)),
]


def test_what_fits_is_let_through() -> None:
    check_fits(FITTING, BaseModel.from_model(tiny.llama()))


@pytest.mark.parametrize("misfit", MISFITS, ids=range(len(MISFITS)))
def test_what_would_fail_in_a_step_is_refused_before(misfit: Primitive) -> None:
    with pytest.raises(ConfigError) as error:
        check_fits([*FITTING, misfit], BaseModel.from_model(tiny.llama()))
    assert error.value.field == misfit.module  # type: ignore[union-attr]
    assert type(misfit).__name__ in str(error.value)


def test_compilation_refuses_what_does_not_fit() -> None:
    config: Any = SimpleNamespace(
        task_type=None, peft_type="ANY", canonical=dict, compile=lambda base, tensors: MISFITS[:1]
    )
    with pytest.raises(ConfigError, match="has no such module"):
        compile_adapter(config, TensorReader({}), BaseModel.from_model(tiny.llama()))


def test_two_of_a_kind_at_a_module_are_refused() -> None:
    """`bind` would keep the last."""
    with pytest.raises(ConfigError, match="two primitives of one kind"):
        check_fits([*FITTING, BiasDelta(NORM, t(64))], BaseModel.from_model(tiny.llama()))


@pytest.mark.parametrize("model", MODELS)
def test_a_primitive_fits_only_where_something_is_wrapped(model: str) -> None:
    plain = MODELS[model]()
    base = BaseModel.from_model(plain)
    served, _ = attached(plain)
    wrapped = {n for n, m in served.named_modules() if isinstance(m, AdapterModule)}
    known = {m.path for m in base.modules.values() if surface_of(m) is not None}
    if base.model_type in known_model_types():
        known |= {branch.path for branch in branches_of(base)}
    assert wrapped == known
