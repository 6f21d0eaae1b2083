"""From PEFT's files to programs: what PEFT computes, module by module; or a refusal by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import CheckpointError, ConfigError, MixtureError
from peftcore.program import (
    AdapterProgram,
    BiasDelta,
    InputScale,
    LowRank,
    OutputScale,
    PrefixKV,
    VirtualTokens,
    check_mixture,
    compile_adapter,
    digest_of,
    tensors_of,
)
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, World

NAMES = list(tiny.peft_configs("llama"))
PROMPT_LEARNING = ["prefix", "prefix-long", "prompt", "p-tuning"]
LAYERED = [name for name in NAMES if name not in PROMPT_LEARNING]
#: One of each way to compile.
KINDS = ["lora-r4", "dora", "lora-bias-all", "lora_bias", "ia3", "prefix", "prompt", "p-tuning"]


# -- what it computes --------------------------------------------------------------------------


def effect(program: AdapterProgram, path: str, base: nn.Module, x: Tensor) -> Tensor:
    """What the program's primitives at `path` make of `x`, by the formula of `program`'s text."""
    at = [p for p in program.primitives if getattr(p, "module", None) == path]
    for p in at:
        if isinstance(p, InputScale):
            x = x * p.v
    y = base(x)
    for p in at:
        if isinstance(p, LowRank):
            y = y + p.scale * (x @ p.a.T @ p.b.T)
    for p in at:
        if isinstance(p, OutputScale):
            y = y * p.v
    for p in at:
        if isinstance(p, BiasDelta):
            y = y + p.b
    return y


@pytest.mark.parametrize("name", LAYERED)
@torch.inference_mode()
def test_each_module_computes_what_pefts_layer_does(name: str, world: World) -> None:
    """Every leaf module of the base, touched by the adapter or not."""
    program = world.saved(name).compile(world.base)
    wrapped = world.in_peft(name).base_model.model
    assert program.modules
    assert len(program.modules) == len(set(program.modules))
    changed = set()
    for path, module in world.base.modules.items():
        if module.kind == "embedding" or list(module.module.children()):
            continue
        width = module.in_features or world.base.hidden_size
        x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(3))
        if path.endswith(("act", "act_fn", "dropout", "rotary_emb")):
            continue
        expected = wrapped.get_submodule(path)(x)
        torch.testing.assert_close(
            effect(program, path, module.module, x), expected, atol=2e-5, rtol=1e-5
        )
        if not torch.equal(expected, module.module(x)):
            changed.add(path)
    assert changed == set(program.modules)


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


@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
@torch.inference_mode()
def test_virtual_tokens_are_pefts_prompt(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    (primitive,) = program.primitives
    assert isinstance(primitive, VirtualTokens)
    prompt = world.in_peft(name).get_prompt(1)[0]
    assert torch.equal(primitive.rows, prompt)
    assert program.num_virtual_tokens == len(prompt)
    assert not program.virtual_kv
    assert program.modules == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_program_says_of_itself(name: str, world: World) -> None:
    saved = world.saved(name)
    program = saved.compile(world.base)
    assert program.method == saved.config["peft_type"]
    ranks = [t.shape[0] for key, t in saved.tensors.items() if "lora_A" in key]
    assert program.max_rank == max(ranks, default=0)
    assert program.adds == (name.startswith("lora"))
    assert program.num_elements == sum(t.numel() for p in program.primitives for t in tensors_of(p))
    assert program.num_virtual_tokens == saved.config.get("num_virtual_tokens", 0)
    assert all(t.dtype == torch.float32 for p in program.primitives for t in tensors_of(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
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
    programs = [world.saved(name).compile(base) for name in NAMES]
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
    for name in NAMES:
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_needed(name: str, world: World) -> None:
    saved = world.saved(name)
    keys = sorted(saved.tensors)
    for key in keys[:: max(1, len(keys) // 8)]:
        error = refusal(saved.changed({key: None}), world.base)
        assert isinstance(error, CheckpointError)
        assert error.key == key
        assert "missing" in str(error)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_is_checked(name: str, world: World) -> None:
    saved = world.saved(name)
    for key in list(saved.tensors)[:: max(1, len(saved.tensors) // 6)]:
        tensor = saved.tensors[key]
        for other in (
            tensor[..., :-1] if tensor.shape[-1] > 1 else tensor.repeat(1, 2),
            tensor[None],
        ):
            error = refusal(saved.changed({key: other.contiguous()}), world.base)
            assert isinstance(error, CheckpointError)
            assert error.key == key
            assert str(list(tensor.shape)) in str(error)
            assert str(list(other.shape)) in str(error)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lora-r4", {"r": 5}),
        ("lora-r4", {"rank_pattern": {r".*\.1\..*": 3}}),
        ("lora-patterns", {"rank_pattern": {}}),
        ("lora-patterns", {"r": 4}),
        ("lora-r4", {"use_dora": True}),
        ("lora-r4", {"lora_bias": True}),
        ("lora-r4", {"bias": "all"}),
        ("lora-r4", {"bias": "lora_only"}),
        ("lora-layers", {"layers_to_transform": None}),
        ("lora-layers", {"layers_to_transform": [0]}),
        ("lora-exclude", {"exclude_modules": None}),
        ("dora", {"use_dora": False}),
        ("lora_bias", {"lora_bias": False}),
        ("lora-bias-all", {"bias": "none"}),
        ("lora-bias-all", {"bias": "lora_only"}),
        ("ia3", {"feedforward_modules": []}),
        ("prefix", {"num_virtual_tokens": 4}),
        ("prompt", {"num_virtual_tokens": 12}),
        ("p-tuning", {"num_virtual_tokens": 5}),
    ],
)
def test_a_config_that_is_not_the_files_is_refused(
    name: str, changes: dict[str, Any], world: World
) -> None:
    error = refusal(world.saved(name).changed(**changes), world.base)
    assert isinstance(error, CheckpointError)
    assert error.key.startswith(("base_model.model.", "prompt_embeddings"))


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lora-regex"])
def test_a_shallower_base_is_refused(name: str, llama_world: World) -> None:
    error = refusal(llama_world.saved(name), BaseModel.from_model(tiny.llama(num_hidden_layers=2)))
    if name in PROMPT_LEARNING:
        assert isinstance(error, ConfigError)
        assert error.field == "num_layers"
        assert "3, but the base model has 2" in str(error)
    else:
        assert isinstance(error, CheckpointError)
        assert "layers.2" in error.key


@pytest.mark.parametrize("name", [*LAYERED, "prefix", "prefix-long"])
def test_another_architecture_is_refused(name: str, llama_world: World, gpt2_world: World) -> None:
    """Of the same width and depth."""
    error = refusal(llama_world.saved(name), gpt2_world.base)
    assert isinstance(error, ConfigError)
    if name in PROMPT_LEARNING:
        assert error.field == "num_attention_heads"  # which counts key-value heads
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
    saved = llama_world.saved("dora")
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    huge = saved.changed({f"{key}.lora_A.weight": torch.full((4, 64), 3e38)})
    error = refusal(huge, llama_world.base)
    assert isinstance(error, CheckpointError)
    assert "not finite" in str(error)
    saved = llama_world.saved("lora_bias")
    bias = saved.changed({f"{key}.lora_B.bias": torch.full((64,), 3e38)}, lora_alpha=400)
    error = refusal(bias, llama_world.base)
    assert isinstance(error, CheckpointError)
    assert error.key == "model.layers.1.self_attn.q_proj"


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


# -- identity ----------------------------------------------------------------------------------


def digest(saved: SavedAdapter) -> str:
    return digest_of(saved.parsed(), saved.reader())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_computed_is_not_in_the_digest(name: str, world: World, tmp_path: Path) -> None:
    saved = world.saved(name)
    digests = {saved.compile(world.base).digest, digest(saved)}
    training_only = {
        "LORA": {"lora_dropout": 0.3, "megatron_core": "else", "init_lora_weights": False},
        "IA3": {"init_ia3_weights": False},
        "PREFIX_TUNING": {"encoder_hidden_size": 999},
        "PROMPT_TUNING": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"},
        "P_TUNING": {"encoder_dropout": 0.5, "encoder_num_layers": 9},
    }[saved.config["peft_type"]]
    inert = {
        "base_model_name_or_path": "elsewhere", "revision": "main", "inference_mode": False,
        "peft_version": "0.1", "auto_mapping": {"a": "b"}, "task_type": None,
    }  # fmt: skip
    digests.add(digest(saved.changed(**training_only)))
    digests.add(digest(saved.changed(**inert)))
    digests.add(digest(saved.changed(option_of_another_version=None)))
    # Another order of keys, of the names that PEFT holds as a set, and of tensors; other metadata.
    config = {k: v[::-1] if isinstance(v, list) else v for k, v in reversed(saved.config.items())}
    digests.add(digest(SavedAdapter(config, dict(reversed(saved.tensors.items())))))
    for i, metadata in enumerate([None, {"format": "pt"}, {"format": "pt", "made": "today"}]):
        save_file(saved.tensors, tmp_path / f"{i}.safetensors", metadata)
        reader = TensorReader.from_file(tmp_path / f"{i}.safetensors")
        digests.add(digest_of(saved.parsed(), reader))
    assert len(digests) == 1
    assert len(digests.pop()) == 64


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_is_in_the_digest(name: str, world: World) -> None:
    saved = world.saved(name)
    variants = [saved]
    for key in list(saved.tensors)[:: max(1, len(saved.tensors) // 5)]:
        changed = saved.tensors[key].clone()
        changed.view(torch.uint8).view(-1)[-2] ^= 1  # one bit
        variants.append(saved.changed({key: changed}))
        variants.append(saved.changed({key: saved.tensors[key][None]}))
        variants.append(saved.changed({key: None, key + "x": saved.tensors[key]}))
        variants.append(saved.changed({key: saved.tensors[key].to(torch.bfloat16)}))
    variants.append(saved.changed({"zz": torch.zeros(1)}))
    key = next(iter(saved.tensors))  # the same bytes, read as another dtype
    variants.append(saved.changed({key: saved.tensors[key].bfloat16().view(torch.float16)}))
    config = saved.config
    changes: list[dict[str, Any]]
    match config["peft_type"]:
        case "LORA":
            changes = [
                {"r": 63}, {"rank_pattern": {"q": 3}}, {"lora_alpha": 63},
                {"alpha_pattern": {"q": 3}}, {"alpha_pattern": {"q": 3, "v": 4}},
                {"alpha_pattern": {"v": 4, "q": 3}},  # the first match wins: the order counts
                {"use_rslora": not config["use_rslora"]}, {"target_modules": ["x"]},
                {"exclude_modules": ["x"]},
                {"bias": "all" if config["bias"] != "all" else "none"},
            ]  # fmt: skip
            if not config["lora_bias"]:
                changes.append({"use_dora": not config["use_dora"]})
        case "IA3":
            changes = [{"feedforward_modules": ["x"]}, {"target_modules": ["x"]}]
        case _:
            changes = [{"num_virtual_tokens": 63}]
    variants += [saved.changed(**change) for change in changes]
    digests = [digest(variant) for variant in variants]
    assert len(set(digests)) == len(digests)


def test_the_same_tensors_under_another_method_are_another_adapter(llama_world: World) -> None:
    tensors = llama_world.saved("prompt").tensors
    digests = {
        digest(SavedAdapter({"peft_type": method, "num_virtual_tokens": 11}, tensors))
        for method in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
    }
    assert len(digests) == 3


def test_a_given_digest_is_kept(llama_world: World) -> None:
    saved = llama_world.saved("lora-r4")
    program = compile_adapter(saved.parsed(), saved.reader(), llama_world.base, digest="d1")
    assert program.digest == "d1"


def test_structure_tells_bases_apart_and_not_their_quantization(llama_world: World) -> None:
    structure = llama_world.base.structure()
    model = copy.deepcopy(llama_world.model)
    quantize_model(model, "nf4")
    assert BaseModel.from_model(model).structure() == structure
    changes: list[dict[str, Any]] = [
        {"num_hidden_layers": 2}, {"intermediate_size": 97}, {"num_key_value_heads": 4},
        {"vocab_size": 301}, {"hidden_size": 32},
    ]  # fmt: skip
    others = {BaseModel.from_model(tiny.llama(**change)).structure() for change in changes}
    assert len(others | {structure}) == len(changes) + 1


# -- mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_only_what_adds_is_mixed(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    part = (name, program.adds, program.method)
    check_mixture([part], [1.0])
    for parts, weights in [
        ([part], [0.5]),
        ([part], [-1.0]),
        ([part, ("other", True, "LORA")], [1.0, 1.0]),
    ]:
        if name.startswith("lora"):
            check_mixture(parts, weights)
        else:
            with pytest.raises(MixtureError, match=rf"'{name}' \({program.method}\)"):
                check_mixture(parts, weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e4, -1e30, 1e39])
def test_a_weight_that_could_overflow_is_refused(weight: float) -> None:
    """1e39 does not fit into the float32 that a matmul takes as its factor: a step would raise."""
    for parts, weights in [
        ([("a", True, "LORA")], [weight]),
        ([("a", True, "LORA"), ("b", True, "LORA")], [1.0, weight]),
    ]:
        with pytest.raises(MixtureError, match="weight"):
            check_mixture(parts, weights)
