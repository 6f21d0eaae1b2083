"""What a compiled adapter is known by: its digest and its base's structure; and what adds up."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import MixtureError
from peftcore.program import check_mixture, compile_adapter, digest_of
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, World, can_be_mixed, each_adapter


def digest(saved: SavedAdapter) -> str:
    return digest_of(saved.parsed(), saved.reader())


#: Other values of what no method computes with.
INERT: dict[str, Any] = {
    "base_model_name_or_path": "elsewhere", "revision": "main", "inference_mode": False,
    "peft_version": "0.1", "auto_mapping": {"a": "b"}, "task_type": None,
}  # fmt: skip
LORA_TRAINING = {
    "lora_dropout": 0.4, "megatron_core": "else", "init_lora_weights": False,
    "fan_in_fan_out": True,
}  # fmt: skip
LYCORIS_TRAINING = {
    "rank_dropout": 0.4, "module_dropout": 0.4, "init_weights": False, "use_effective_conv2d": True,
}  # fmt: skip
PROMPT_TRAINING = {
    "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "y",
    "tokenizer_kwargs": {"a": 1},
}  # fmt: skip

#: By method, other values of what only training reads.
NOT_COMPUTED: dict[str, dict[str, Any]] = {
    "LORA": LORA_TRAINING,
    "ADALORA": LORA_TRAINING | {
        "r": 3, "target_r": 1, "tinit": 1, "tfinal": 2, "deltaT": 3, "beta1": 0.5, "beta2": 0.6,
        "orth_reg_weight": 0.7, "total_step": 99,
    },
    "LOHA": LYCORIS_TRAINING,
    "LOKR": LYCORIS_TRAINING | {"rank_dropout_scale": True},
    "VERA": {"vera_dropout": 0.4, "d_initial": 0.9, "init_weights": False, "fan_in_fan_out": True},
    "IA3": {"init_ia3_weights": False, "fan_in_fan_out": True},
    "OFT": {"module_dropout": 0.4, "init_weights": False, "fan_in_fan_out": True},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"init_weights": False},
    "PREFIX_TUNING": {
        "encoder_hidden_size": 999, "prefix_projection": True, "init_weights": "zero",
    },
    "PROMPT_TUNING": PROMPT_TRAINING,
    "MULTITASK_PROMPT_TUNING": PROMPT_TRAINING | {
        "prompt_tuning_init_state_dict_path": "x.safetensors", "prompt_tuning_init_task": 4,
    },
    "P_TUNING": {
        "encoder_dropout": 0.5, "encoder_num_layers": 9, "encoder_hidden_size": 999,
        "encoder_reparameterization_type": "LSTM",
    },
}  # fmt: skip

PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"q": 3}}, {"alpha_pattern": {"q": 3}}, {"alpha_pattern": {"q": 3, "v": 4}},
    {"alpha_pattern": {"v": 4, "q": 3}},  # the first match wins: the order counts
]  # fmt: skip
TARGETS: list[dict[str, Any]] = [{"target_modules": ["x"]}, {"exclude_modules": ["x"]}]
SAVED: list[dict[str, Any]] = [{"modules_to_save": ["x"]}]
LAYERS: list[dict[str, Any]] = [
    {"target_modules": ["x"], "layers_to_transform": [63]},
    {"target_modules": ["x"], "layers_to_transform": [63], "layers_pattern": ["x"]},
]
PROMPT: list[dict[str, Any]] = [
    {"num_virtual_tokens": 63}, {"token_dim": 63}, {"num_layers": 63}, {"num_attention_heads": 63},
    {"num_transformer_submodules": 63},
]  # fmt: skip
ALPHA: list[dict[str, Any]] = [{"lora_alpha": 63}]

#: By method, other values of what is computed; in FLIPPED the options that are on or off.
COMPUTED: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {"r": 63}, {"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [2, 1]},
        {"trainable_token_indices": {"x": [1, 2]}},
        *ALPHA, *PATTERNS, *TARGETS, *LAYERS, *SAVED,
    ],
    "ADALORA": [
        {"init_r": 63}, {"rank_pattern": {"x.lora_E": [False]}, "init_r": 1},
        {"rank_pattern": {"x.lora_E": [True]}, "init_r": 1}, *ALPHA, *TARGETS, *LAYERS,
        *SAVED,
    ],
    "LOHA": [{"r": 63}, {"alpha": 63}, *PATTERNS, *TARGETS, *LAYERS, *SAVED],
    "LOKR": [
        {"r": 63}, {"alpha": 63}, {"decompose_factor": 5}, *PATTERNS, *TARGETS, *LAYERS, *SAVED,
    ],
    "VERA": [{"r": 63}, {"projection_prng_key": 63}, *TARGETS[:1], *LAYERS, *SAVED],
    "IA3": [{"feedforward_modules": ["x"]}, *TARGETS, *SAVED],
    "OFT": [
        {"r": 63, "oft_block_size": 0}, {"r": 0, "oft_block_size": 63}, {"eps": 0.63},
        {"num_cayley_neumann_terms": 7}, *TARGETS, *LAYERS, *SAVED,
    ],
    "LN_TUNING": [*TARGETS, *SAVED],
    "TRAINABLE_TOKENS": [
        {"token_indices": [1, 2]}, {"token_indices": [2, 1]}, {"target_modules": ["x"]},
    ],
    "PREFIX_TUNING": [*PROMPT, *SAVED],
    "PROMPT_TUNING": [*PROMPT, *SAVED],
    "MULTITASK_PROMPT_TUNING": [*PROMPT, *SAVED, {"num_ranks": 63}, {"num_tasks": 63}],
    "P_TUNING": [*PROMPT, *SAVED],
}  # fmt: skip
FLIPPED = {
    "LORA": ["use_rslora", "use_dora", "lora_bias"],
    "LOKR": ["decompose_both"],
    "VERA": ["save_projection"],
    "OFT": ["coft", "block_share", "use_cayley_neumann"],
}
#: Lists whose order counts, and is that of the file's rows.
ORDERED = ["token_indices", "trainable_token_indices"]


@each_adapter()
def test_what_is_not_computed_is_not_in_the_digest(name: str, world: World, tmp_path: Path) -> None:
    saved = world.saved(name)
    digests = {saved.compile(world.base).digest, digest(saved)}
    for key, value in NOT_COMPUTED[saved.config["peft_type"]].items():
        other = not value if value == saved.config[key] else value
        digests.add(digest(saved.changed(**{key: other})))
    digests.add(digest(saved.changed(**INERT)))
    digests.add(digest(saved.changed(option_of_another_version=None)))
    # Another order of keys, of the names that PEFT holds as a set, and of tensors; other metadata.
    config = {
        k: v[::-1] if isinstance(v, list) and k not in ORDERED else v
        for k, v in reversed(saved.config.items())
    }
    digests.add(digest(SavedAdapter(config, dict(reversed(saved.tensors.items())))))
    for i, metadata in enumerate([None, {"format": "pt"}, {"format": "pt", "made": "today"}]):
        save_file(saved.tensors, tmp_path / f"{i}.safetensors", metadata)
        reader = TensorReader.from_file(tmp_path / f"{i}.safetensors")
        digests.add(digest_of(saved.parsed(), reader))
    assert len(digests) == 1
    assert len(digests.pop()) == 64


@each_adapter()
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
    config, method = saved.config, saved.config["peft_type"]
    changes = list(COMPUTED[method])
    if "bias" in config:
        changes.append({"bias": "all" if config["bias"] != "all" else "none"})
    for option in FLIPPED.get(method, []):
        other = {"use_dora": "lora_bias", "lora_bias": "use_dora"}.get(option)
        if other is None or not config[other]:  # which exclude each other
            changes.append({option: not config[option]})
    variants += [saved.changed(**change) for change in changes]
    digests = [digest(variant) for variant in variants]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("method", COMPUTED)
def test_every_option_is_in_the_digest_or_not(method: str) -> None:
    """By the tables above: a new option has to be put into one of them."""
    config_class = next(
        type(tiny.our_config(config))
        for config in tiny.peft_configs("llama").values()
        if config.peft_type == method
    )
    computed = {option for change in COMPUTED[method] for option in change}
    options = computed | NOT_COMPUTED[method].keys() | {*FLIPPED.get(method, []), *INERT, "bias"}
    if method == "TRAINABLE_TOKENS":  # which refuses it
        options.add("modules_to_save")
    assert {f.name for f in dataclasses.fields(config_class)} <= options


def test_the_same_tensors_under_another_method_are_another_adapter(llama_world: World) -> None:
    tensors = llama_world.saved("prompt").tensors
    digests = {
        digest(SavedAdapter({"peft_type": method, "num_virtual_tokens": 11}, tensors))
        for method in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
    }
    assert len(digests) == 4


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


@each_adapter()
def test_only_what_adds_is_mixed(name: str, world: World) -> None:
    program = world.saved(name).compile(world.base)
    part = (name, program.adds, program.method)
    check_mixture([part], [1.0])
    for parts, weights in [
        ([part], [0.5]),
        ([part], [-1.0]),
        ([part, ("other", True, "LORA")], [1.0, 1.0]),
    ]:
        if can_be_mixed(name):
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
