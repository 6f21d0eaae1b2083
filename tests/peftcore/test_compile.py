"""From PEFT's files to programs: what PEFT computes, module by module; or a refusal by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.base import BaseModel
from peftcore.errors import CheckpointError, ConfigError
from peftcore.primitives import (
    BiasDelta,
    InputRotation,
    InputScale,
    LowRank,
    ModuleOverride,
    OutputScale,
    PrefixKV,
    RowOverride,
    VirtualTokens,
    tensors_of,
)
from peftcore.program import AdapterProgram
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.worlds import NAMES, SavedAdapter, World, can_be_mixed, each_adapter, quiet

PROMPT_LEARNING = ["prefix", "prefix-long", "prompt", "p-tuning", "multitask"]
#: One of each way to compile.
KINDS = [
    "lora-r4", "dora", "lora-bias-all", "lora_bias", "lora-embedding", "lora-head", "lora-saved",
    "lora-tokens", "adalora", "adalora-bias", "vera", "vera-drawn", "loha", "loha-full", "lokr",
    "lokr-full", "ia3", "oft", "oft-exact", "coft", "norms", "tokens", "prefix", "prompt",
    "p-tuning", "multitask",
]  # fmt: skip


# -- what it computes --------------------------------------------------------------------------


def effect(program: AdapterProgram, path: str, base: nn.Module, x: Tensor) -> Tensor:
    """What the program's primitives at `path` make of `x`, by the formula of `program`'s text.

    x: rows `[..., in]`; at an embedding ids.
    """
    found = [p for p in program.primitives if getattr(p, "module", None) == path]
    at: dict[type, Any] = {type(p): p for p in found}
    assert len(at) == len(found), "at most one of a kind"
    is_embedding = isinstance(base, nn.Embedding)
    if is_embedding:
        assert at.keys() <= {ModuleOverride, LowRank, RowOverride}
    if InputRotation in at:
        blocks = at[InputRotation].blocks
        pieces = x.unflatten(-1, (len(blocks), -1))
        x = torch.einsum("...nb,nbc->...nc", pieces, blocks).flatten(-2)
    if InputScale in at:
        x = x * at[InputScale].v
    y = overridden(base, at[ModuleOverride], x) if ModuleOverride in at else base(x)
    if LowRank in at:
        p = at[LowRank]
        inner = F.embedding(x, p.a.t()) if is_embedding else x @ p.a.t()
        y = y + p.scale * (inner @ p.b.t())
    if OutputScale in at:
        y = y * at[OutputScale].v
    if BiasDelta in at:
        y = y + at[BiasDelta].b
    if RowOverride in at:
        ids, rows = list(at[RowOverride].ids), at[RowOverride].rows
        if is_embedding:
            for i, row in zip(ids, rows, strict=True):
                y[x == i] = row
        else:
            y[..., ids] = F.linear(x, rows, None if base.bias is None else base.bias[ids])
    return y


def overridden(base: nn.Module, primitive: ModuleOverride, x: Tensor) -> Tensor:
    weight, bias = primitive.weight, primitive.bias
    values = {"weight": weight.t() if isinstance(base, Conv1D) else weight}
    if getattr(base, "bias", None) is not None:
        values["bias"] = torch.zeros_like(base.bias) if bias is None else bias
    else:
        assert bias is None
    return functional_call(base, values, x)


@torch.inference_mode()
def assert_layers_are(program: AdapterProgram, in_peft: peft.PeftModel, base: BaseModel) -> None:
    """Every module of the base with parameters of its own, touched by the adapter or not."""
    wrapped = in_peft.base_model.model
    assert program.modules
    assert len(program.modules) == len(set(program.modules))
    changed = set()
    for path, module in base.modules.items():
        weight = getattr(module.module, "weight", None)
        if weight is None:
            assert not list(module.module.parameters(recurse=False))
            continue
        if module.kind == "embedding":
            x = torch.arange(len(weight))[None]
        else:
            width = module.in_features or len(weight)  # a norm's
            x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(3))
        expected = wrapped.get_submodule(path)(x)
        torch.testing.assert_close(
            effect(program, path, module.module, x), expected, atol=2e-5, rtol=1e-5
        )
        if not torch.equal(expected, module.module(x)):
            changed.add(path)
    assert changed == set(program.modules)


@each_adapter(but=PROMPT_LEARNING)
def test_each_module_computes_what_pefts_layer_does(name: str, world: World) -> None:
    assert_layers_are(world.saved(name).compile(world.base), world.in_peft(name), world.base)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["c_fc", "h.1.attn.c_proj"]},
        {"modules_to_save": ["h.2.mlp", "wpe"]},
        {"target_modules": ["c_fc", "wpe"], "lora_alpha": 3},
    ],
)
def test_a_conv1d_a_container_and_positions_compute_what_pefts_do(
    options: dict[str, Any], gpt2_world: World, tmp_path: Path
) -> None:
    config = peft.LoraConfig(**({"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"} | options))
    program = gpt2_world.save(config, tmp_path).compile(gpt2_world.base)
    with quiet():
        in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(gpt2_world.model), tmp_path)
    assert_layers_are(program, in_peft.eval(), gpt2_world.base)


def test_every_primitive_is_among_the_cases(world: World) -> None:
    found = {type(p) for n in world.folders for p in world.saved(n).compile(world.base).primitives}
    assert found == {
        LowRank, InputRotation, InputScale, OutputScale, BiasDelta, ModuleOverride, RowOverride,
        PrefixKV, VirtualTokens,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["prefix", "prefix-long"])
@torch.inference_mode()
def test_a_prefix_is_what_peft_puts_in_the_cache(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    cache = world.in_peft(name).get_prompt(1)
    assert [p.layer for p in program.primitives] == [0, 1, 2]  # type: ignore[union-attr]
    for primitive, layer in zip(program.primitives, cache.layers, strict=True):
        assert isinstance(primitive, PrefixKV)
        assert torch.equal(primitive.keys.transpose(0, 1), layer.keys[0])
        assert torch.equal(primitive.values.transpose(0, 1), layer.values[0])
    assert program.num_virtual_tokens == cache.get_seq_length()
    assert program.virtual_kv


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "multitask"])
@torch.inference_mode()
def test_virtual_tokens_are_pefts_prompt(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    (primitive,) = program.primitives
    assert isinstance(primitive, VirtualTokens)
    task_ids = torch.tensor([0]) if name == "multitask" else None
    prompt = world.in_peft(name).get_prompt(1, task_ids)[0]
    assert torch.equal(primitive.rows, prompt)
    assert program.num_virtual_tokens == len(prompt)
    assert not program.virtual_kv
    assert program.modules == []


#: Of the primitives, those whose effects add up; an adapter of others cannot be mixed.
ADDING = (LowRank, BiasDelta)


@each_adapter()
def test_what_a_program_says_of_itself(name: str, world: World) -> None:
    saved = world.saved(name)
    program = saved.compile(world.base)
    assert program.method == saved.config["peft_type"]
    ranks = [
        t.shape[0]
        for key, t in saved.tensors.items()
        if "lora_A" in key or "lora_embedding_A" in key or key.endswith("vera_lambda_d")
    ]
    if program.method in ("LOHA", "LOKR"):  # products of ranks: their own tests know them
        assert program.max_rank > 0
    else:
        assert program.max_rank == max(ranks, default=0)
    assert program.adds == can_be_mixed(name)
    assert program.adds == all(isinstance(p, ADDING) for p in program.primitives)
    assert program.num_elements == sum(t.numel() for p in program.primitives for t in tensors_of(p))
    assert program.num_virtual_tokens == saved.config.get("num_virtual_tokens", 0)
    assert all(t.dtype == torch.float32 for p in program.primitives for t in tensors_of(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_adapter(KINDS)
def test_half_precision_files_are_computed_in_float32(
    name: str, dtype: torch.dtype, world: World
) -> None:
    """As from the same values in float32, bit for bit; the digest tells the files apart."""
    saved = world.saved(name)
    half = SavedAdapter(saved.config, {k: t.to(dtype) for k, t in saved.tensors.items()})
    full = SavedAdapter(saved.config, {k: t.to(torch.float32) for k, t in half.tensors.items()})
    programs = half.compile(world.base), full.compile(world.base)
    for mine, theirs in zip(programs[0].primitives, programs[1].primitives, strict=True):
        for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
    assert programs[0].digest != programs[1].digest


# -- the base ----------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of all that the model holds, tied or not kept in checkpoints too."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in held}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_compiling_never_changes_the_base(quantization: Any, world: World) -> None:
    """Weights that share memory with the base are read only: DoRA once wrote into them."""
    model = copy.deepcopy(world.model)
    quantize_model(model, quantization)
    base = BaseModel.from_model(model)
    before = state_of(model)
    programs = [world.saved(name).compile(base) for name in world.folders]
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    for program in programs:
        for primitive in program.primitives:
            for tensor in tensors_of(primitive):
                assert tensor.untyped_storage().data_ptr() not in owned


def test_compiling_never_changes_the_file(world: World) -> None:
    for name in world.folders:
        saved = world.saved(name)
        before = {key: tensor.clone() for key, tensor in saved.tensors.items()}
        saved.compile(world.base)
        assert all(torch.equal(saved.tensors[key], tensor) for key, tensor in before.items()), name


def test_dora_on_a_quantized_base_takes_its_norm(llama_world: World, tmp_path: Path) -> None:
    """The norm of the dequantized weight, which is what multiplies."""
    model = copy.deepcopy(llama_world.model)
    quantize_model(model, "nf4")
    base = BaseModel.from_model(model)
    program = llama_world.saved("dora").compile(base)
    saved = llama_world.saved("dora").tensors
    for primitive in program.primitives:
        if isinstance(primitive, OutputScale):
            key = f"base_model.model.{primitive.module}"
            quantized = model.get_submodule(primitive.module)
            update = 1.5 * saved[f"{key}.lora_B.weight"] @ saved[f"{key}.lora_A.weight"]
            norm = (quantized.dequantize() + update).norm(dim=1)
            torch.testing.assert_close(primitive.v, saved[f"{key}.lora_magnitude_vector"] / norm)


# -- what is refused ---------------------------------------------------------------------------


def refusal(saved: SavedAdapter, base: BaseModel) -> CheckpointError | ConfigError:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        saved.compile(base)
    return caught.value


@each_adapter()
def test_a_wrong_prefix_is_refused(name: str, world: World) -> None:
    """PEFT only warns, and serves the base model."""
    saved = world.saved(name)
    for change in (
        lambda key: f"base_model.{key}",
        lambda key: key.removeprefix("base_model.") + ("x" if name in PROMPT_LEARNING else ""),
        lambda key: key + ".default",
    ):
        renamed = SavedAdapter(saved.config, {change(k): t for k, t in saved.tensors.items()})
        error = refusal(renamed, world.base)
        assert isinstance(error, CheckpointError)
        assert error.key in saved.tensors
        assert "missing" in str(error)


def is_optional(key: str, world: World) -> bool:
    """May the key be missing?"""
    # PEFT writes an embedding's own weights beside an adapter on it, or not, by an option of
    # `save_pretrained`: here they are compared with the base's and not used.
    copies = {f"base_model.model.{m.path}.base_layer.weight" for m in world.base.embeddings}
    # Of an embedding and an output that shares its weight PEFT saves the rows once or twice.
    tied = f"base_model.model.{world.base.tied_output}.trainable_tokens_delta"
    return key in copies or key == tied


@each_adapter()
def test_every_key_is_needed(name: str, world: World) -> None:
    saved = world.saved(name)
    for key in saved.tensors:
        if is_optional(key, world):
            saved.changed({key: None}).compile(world.base)
            continue
        error = refusal(saved.changed({key: None}), world.base)
        assert isinstance(error, CheckpointError)
        assert error.key == key
        assert "missing" in str(error)


@each_adapter()
def test_an_extra_key_is_refused(name: str, world: World) -> None:
    saved = world.saved(name)
    path = next(m.path for m in world.base.modules.values() if m.is_linear)
    for key in (
        "more",
        f"base_model.model.{path}.lora_C.weight",
        f"base_model.model.{path}.lora_A.default.weight",
        f"base_model.model.{path}.weight",
        "base_model.model.nowhere.lora_A.weight",
    ):
        error = refusal(saved.changed({key: torch.ones(4, 4)}), world.base)
        assert isinstance(error, CheckpointError)
        assert error.key == key
        assert "no module of the base model takes this key" in str(error)


@each_adapter()
def test_every_shape_is_checked(name: str, world: World) -> None:
    saved = world.saved(name)
    for key, tensor in saved.tensors.items():
        for other in (
            tensor[..., :-1] if tensor.shape[-1] > 1 else tensor.repeat(1, 2),
            tensor[None],
        ):
            error = refusal(saved.changed({key: other.contiguous()}), world.base)
            assert isinstance(error, CheckpointError)
            assert error.key == key
            assert str(list(tensor.shape)) in str(error)
            assert str(list(other.shape)) in str(error)


#: Changes of a config under which the file's tensors are too few, too many or misshapen.
MISFITS: dict[str, list[dict[str, Any]]] = {
    "lora-r4": [
        {"r": 5}, {"rank_pattern": {r".*\.1\..*": 3}}, {"use_dora": True}, {"lora_bias": True},
        {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
    "lora-patterns": [{"rank_pattern": {}}, {"r": 4}],
    "lora-layers": [{"layers_to_transform": None}, {"layers_to_transform": [0]}],
    "lora-exclude": [{"exclude_modules": None}],
    "dora": [{"use_dora": False}],
    "lora_bias": [{"lora_bias": False}],
    "lora-bias-all": [{"bias": "none"}, {"bias": "lora_only"}],
    "lora-bias-own": [{"bias": "none"}, {"bias": "all"}],
    "lora-embedding": [{"r": 5}, {"target_modules": ["q_proj", "c_attn"]}],
    "lora-head": [{"r": 5}, {"target_modules": ["c_attn", "q_proj", "v_proj"]}],
    "lora-saved": [{"modules_to_save": None}, {"modules_to_save": ["lm_head"]}],
    "lora-head-saved": [{"modules_to_save": None}, {"bias": "none"}],
    "lora-tokens": [
        {"trainable_token_indices": None}, {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"lm_head": tiny.TOKEN_IDS}},
    ],
    "lora-tokens-apart": [{"trainable_token_indices": tiny.TOKEN_IDS[:9]}],
    "adalora": [
        {"init_r": 5}, {"bias": "all"}, {"target_modules": ["q_proj", "attn.c_proj"]},
    ],
    "adalora-bias": [{"bias": "none"}, {"bias": "lora_only"}],
    "vera": [{"r": 23}, {"save_projection": False}, {"bias": "vera_only"}],
    "vera-drawn": [{"r": 8}, {"save_projection": True}, {"bias": "none"}],
    "vera-layers": [{"layers_to_transform": None}, {"layers_to_transform": [0]}],
    "loha": [{"r": 5}, {"peft_type": "LOKR"}],
    "lokr": [
        {"r": 3}, {"decompose_both": True}, {"decompose_factor": 4},
    ],
    "lokr-both": [{"decompose_both": False}, {"r": 8}],
    "ia3": [{"feedforward_modules": []}],
    "oft": [
        {"oft_block_size": 8}, {"oft_block_size": 0, "r": 8}, {"block_share": True},
        {"target_modules": ["o_proj", "attn.c_proj"]},
    ],
    "oft-shared": [{"block_share": False}],
    "norms": [{"target_modules": ["norm", "ln_f"]}, {"target_modules": ["q_proj", "c_attn"]}],
    "norms-default": [{"exclude_modules": ["norm", "ln_f"]}],
    "tokens": [
        {"token_indices": [1, 2]}, {"token_indices": [*tiny.TOKEN_IDS, 5]},
        {"target_modules": ["lm_head"]},
    ],
    "prefix": [{"num_virtual_tokens": 4}],
    "prompt": [{"num_virtual_tokens": 12}, {"peft_type": "MULTITASK_PROMPT_TUNING"}],
    "p-tuning": [{"num_virtual_tokens": 5}],
    "multitask": [{"num_virtual_tokens": 5}, {"num_ranks": 2}, {"num_tasks": 2}],
}  # fmt: skip


@each_adapter(MISFITS)
def test_a_config_that_is_not_the_files_is_refused(name: str, world: World) -> None:
    for changes in MISFITS[name]:
        error = refusal(world.saved(name).changed(**changes), world.base)
        assert isinstance(error, CheckpointError), changes
        assert error.key.startswith(("base_model.", "prompt_embeddings", "prefix_task_")), changes


@pytest.mark.parametrize("name", NAMES["llama"])
def test_a_narrower_base_is_refused(name: str, llama_world: World) -> None:
    saved = llama_world.saved(name)
    narrow = BaseModel.from_model(tiny.llama(hidden_size=32, intermediate_size=48))
    error = refusal(saved, narrow)
    if name in PROMPT_LEARNING:
        assert isinstance(error, ConfigError)
        assert error.field == "token_dim"
        assert ("32, but the base model has 16" if "prefix" in name else "64, but") in str(error)
    else:
        assert isinstance(error, CheckpointError)
        assert error.key in saved.tensors


#: What acts on layer 1 alone, or on no layer.
IN_NO_LAST_LAYER = ["lora-regex", "norms", "tokens", "tokens-drawn"]


@pytest.mark.parametrize("name", NAMES["llama"])
def test_a_shallower_base_is_refused(name: str, llama_world: World) -> None:
    saved = llama_world.saved(name)
    model = copy.deepcopy(llama_world.model)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    shallow = BaseModel.from_model(model)
    if name in IN_NO_LAST_LAYER:  # which fit
        assert saved.compile(shallow).modules
        return
    error = refusal(saved, shallow)
    if name in PROMPT_LEARNING:
        assert isinstance(error, ConfigError)
        assert error.field == "num_layers"
        assert "3, but the base model has 2" in str(error)
    else:
        assert isinstance(error, CheckpointError)
        assert "layers.2" in error.key


@pytest.mark.parametrize("name", NAMES["llama"])
def test_another_architecture_is_refused(name: str, llama_world: World, gpt2_world: World) -> None:
    """Of the same width and depth."""
    saved = llama_world.saved(name)
    if name in ("prompt", "p-tuning", "multitask"):  # rows of the same width: they fit
        assert saved.compile(gpt2_world.base).num_virtual_tokens
        return
    error = refusal(saved, gpt2_world.base)
    if name in ("lora-head", "lora-head-alone"):  # both have a head
        assert isinstance(error, CheckpointError)
        assert error.key in saved.tensors
        return
    assert isinstance(error, ConfigError)
    if name in PROMPT_LEARNING:
        assert error.field == "num_attention_heads"  # which counts key-value heads
    elif name == "lora-saved":
        assert error.field == "modules_to_save"
        assert "embed_tokens" in str(error)
    else:
        assert error.field == "target_modules"
        assert "c_attn" in str(error)


def test_a_prefix_needs_one_shape_of_keys_and_values(llama_world: World) -> None:
    for shapes in (((2, 16, 16), (2, 16, 16), (4, 16, 16)), ((2, 16, 8),) * 3):
        base = BaseModel.from_model(llama_world.model, shapes)
        error = refusal(llama_world.saved("prefix"), base)
        assert isinstance(error, ConfigError)
        assert error.field == "peft_type"


def test_other_tasks_and_encoders_are_refused(llama_world: World) -> None:
    for task in ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"):
        error = refusal(llama_world.saved("lora-r4").changed(task_type=task), llama_world.base)
        assert isinstance(error, ConfigError)
        assert error.field == "task_type"
        assert task in str(error)
    llama_world.saved("lora-r4").changed(task_type=None).compile(llama_world.base)
    for name in PROMPT_LEARNING:
        saved = llama_world.saved(name).changed(num_transformer_submodules=2)
        error = refusal(saved, llama_world.base)
        assert isinstance(error, ConfigError)
        assert error.field == "num_transformer_submodules"


def test_values_that_overflow_are_refused(llama_world: World) -> None:
    """Each is finite in the file; what they compile to is not."""
    path = "model.layers.1.self_attn.q_proj"
    saved = llama_world.saved("dora")
    key = f"base_model.model.{path}"
    huge = saved.changed({f"{key}.lora_A.weight": torch.full((4, 64), 3e38)})
    error = refusal(huge, llama_world.base)
    assert isinstance(error, CheckpointError)
    assert "not finite" in str(error)
    for name, suffix, changes in [
        ("lora_bias", "lora_B.bias", {"lora_alpha": 400}),
        ("adalora", "lora_A", {}),
        ("loha", "hada_w1_a", {}),
        ("lokr", "lokr_w1", {}),
        ("vera", "vera_lambda_d", {}),
        ("oft", "oft_R.weight", {}),
        ("oft-exact", "oft_R.weight", {}),
    ]:
        saved = llama_world.saved(name)
        tensors = {k: t * 100 for k, t in saved.tensors.items()}  # so that a product overflows
        tensors[f"{key}.{suffix}"] = torch.full_like(saved.tensors[f"{key}.{suffix}"], 3e38)
        error = refusal(saved.changed(tensors, **changes), llama_world.base)
        assert isinstance(error, CheckpointError)
        assert error.key == path, name
        assert "not finite" in str(error)


# -- the output embedding ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_head(llama_world: World, tmp_path_factory: pytest.TempPathFactory) -> SavedAdapter:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return llama_world.save(config, tmp_path_factory.mktemp("lm_head"))


LM_HEAD_COPY = "base_model.model.lm_head.base_layer.weight"


def assert_updates_output(saved: SavedAdapter, base: BaseModel) -> None:
    """With PEFT's copy of the base's weights in the file, and without."""
    for given in (saved, saved.changed({LM_HEAD_COPY: None})):
        program = given.compile(base)
        (update,) = (p for p in program.primitives if getattr(p, "module", "") == "lm_head")
        assert isinstance(update, LowRank)
        assert torch.equal(update.a, saved.tensors["base_model.model.lm_head.lora_A.weight"])


def test_an_output_embedding_can_be_a_target(lm_head: SavedAdapter, llama_world: World) -> None:
    assert torch.equal(lm_head.tensors[LM_HEAD_COPY], llama_world.model.lm_head.weight)
    assert_updates_output(lm_head, llama_world.base)


def test_a_tied_output_embedding_can_be_a_target(gpt2_world: World, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["c_fc", "lm_head"], task_type="CAUSAL_LM")
    saved = gpt2_world.save(config, tmp_path)
    assert torch.equal(saved.tensors[LM_HEAD_COPY], gpt2_world.model.transformer.wte.weight)
    assert_updates_output(saved, gpt2_world.base)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_copy_is_compared_with_a_quantized_base_too(
    quantization: Any, lm_head: SavedAdapter, llama_world: World
) -> None:
    model = copy.deepcopy(llama_world.model)
    quantize_model(model, quantization)
    base = BaseModel.from_model(model)
    lm_head.compile(base)
    half = lm_head.tensors[LM_HEAD_COPY].to(torch.bfloat16)
    lm_head.changed({LM_HEAD_COPY: half}).compile(base)


def test_a_changed_copy_is_refused(lm_head: SavedAdapter, llama_world: World) -> None:
    weight = lm_head.tensors[LM_HEAD_COPY]
    others = {
        "another model's": torch.randn_like(weight) * weight.std(),
        "zeros": torch.zeros_like(weight),
        "permuted": weight.flip(0),
        "scaled": weight * 1.25,
    }
    for name, other in others.items():
        error = refusal(lm_head.changed({LM_HEAD_COPY: other}), llama_world.base)
        assert isinstance(error, CheckpointError), name
        assert error.key == LM_HEAD_COPY
        assert "differs from the base" in str(error)
    resized = lm_head.changed({LM_HEAD_COPY: torch.cat([weight, weight[:2]])})
    error = refusal(resized, llama_world.base)
    assert isinstance(error, CheckpointError)
    assert error.key == LM_HEAD_COPY
    assert "302" in str(error)
