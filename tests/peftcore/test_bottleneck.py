"""Bottleneck adapters against AdapterHub's `adapters`: results, training, files both ways.

The fixtures hold what `adapters` computed (`make_adapterhub_fixtures` says how). Where the variable
POLYPEFT_ADAPTERHUB names a folder that has it, our files are loaded in it as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcore import (
    BottleneckConfig,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    config_from_json,
    get_peft_model,
)
from peftcore.base import BaseModel
from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import MixtureError
from peftcore.layers import AdapterBatch, Segment, attach
from peftcore.packing import bind, pack
from peftcore.primitives import Bottleneck
from peftcore.program import check_mixture, compile_adapter
from tests import tiny
from tests.peftcore import make_adapterhub_fixtures as original
from tests.peftcore.hub import NAME, Hub, headed, hub

MODELS = list(original.MODELS)
CASES = [
    pytest.param(model, case, id=f"{model}-{case}")
    for model in MODELS
    for case, _ in original.configs(model)
]
ORACLE = os.environ.get("POLYPEFT_ADAPTERHUB")


def new_adapter(world: Hub, case: str) -> PeftModel:
    """An adapter of ours from the case's config, as `adapters` began."""
    config = config_from_dict(world.cases[case]["config"])
    if "Sequence" in original.MODELS[world.model][0]:
        config = dataclasses.replace(config, task_type="SEQ_CLS")
    base = world.base()
    torch.manual_seed(3)
    return get_peft_model(base, config)


def random_adapter(model: Any, config: BottleneckConfig, seed: int) -> PeftModel:
    """A new adapter with weights that matter."""
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return made.eval()


def outputs(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**{k: v for k, v in inputs.items() if k != "labels"}, **kwargs)
    return found.logits if "logits" in found else found.last_hidden_state


# -- AdapterHub's files ------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "case"), CASES)
def test_its_adapters_give_its_results(model: str, case: str, tmp_path: Path) -> None:
    world = hub(model)
    loaded = PeftModel.from_pretrained(world.base(), world.save(case, tmp_path))
    got = original.exact_outputs(loaded, model)
    torch.testing.assert_close(got, world.expected(case), atol=1e-5, rtol=0)
    base = original.outputs(world.base(), model)
    assert (world.expected(case) - base).abs().max() > 0.1
    with loaded.disable_adapter():
        assert torch.equal(original.outputs(loaded, model), base)
    assert torch.equal(original.outputs(loaded.unload(), model), base)


@pytest.mark.parametrize(("model", "case"), CASES)
def test_training_is_its_own_and_so_are_the_files(model: str, case: str, tmp_path: Path) -> None:
    """The same seed gives the same weights and losses; what is saved has the same keys, shapes and
    dtypes and the same config."""
    world = hub(model)
    made = new_adapter(world, case)
    made.save_pretrained(tmp_path / "initial")
    initial = load_file(tmp_path / "initial" / "adapter.safetensors")
    for key, tensor in world.adapter(case, "initial").items():
        torch.testing.assert_close(initial[key], tensor, atol=1e-7, rtol=0)
    losses = original.train(made, model)
    assert losses == pytest.approx(world.cases[case]["losses"], abs=1e-5)
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in saved.items()} == {
        k: (v.shape, v.dtype) for k, v in world.adapter(case).items()
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == world.cases[case]["config"]
    again = PeftModel.from_pretrained(world.base(), tmp_path)
    expected = original.outputs(made, model)
    torch.testing.assert_close(original.outputs(again, model), expected, atol=1e-6, rtol=0)
    assert type(again) is type(made)
    has_head = "Sequence" in original.MODELS[model][0]
    assert (tmp_path / "model_head.safetensors").is_file() == has_head
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.skipif(ORACLE is None, reason="POLYPEFT_ADAPTERHUB names no folder with adapters")
@pytest.mark.parametrize("model", MODELS)
def test_adapterhub_loads_ours(model: str, tmp_path: Path) -> None:
    """Body and head: our results, and the same tensors where it saves them again."""
    world = hub(model)
    expected, folders = {}, []
    for case, _ in original.configs(model):
        made = new_adapter(world, case)
        original.train(made, model)
        made.save_pretrained(tmp_path / case)
        expected[case] = original.outputs(made, model)
        folders.append(str(tmp_path / case))
    subprocess.run(
        [sys.executable, original.__file__, "outputs", model, *folders],
        env={**os.environ, "PYTHONPATH": str(ORACLE)},
        check=True,
        capture_output=True,
    )
    for case, ours in expected.items():
        theirs = load_file(tmp_path / case / "adapters.safetensors")
        torch.testing.assert_close(theirs.pop("outputs"), ours, atol=1e-5, rtol=0)
        saved = load_file(tmp_path / case / "adapter.safetensors")
        assert theirs.keys() == {f"saved/{key}" for key in saved}
        assert all(torch.equal(theirs[f"saved/{key}"], tensor) for key, tensor in saved.items())


def test_keys_may_name_the_backbone_or_not(tmp_path: Path) -> None:
    """They are those of the model that the adapter was saved from."""
    world = hub("bert")
    whole = PeftModel.from_pretrained(world.base(), world.save("double_seq_bn", tmp_path / "whole"))
    inputs = {k: v for k, v in original.batch("bert").items() if k != "labels"}
    with torch.no_grad():
        expected = whole.model.bert(**inputs).last_hidden_state
    body = world.base().bert
    bare = PeftModel.from_pretrained(body, tmp_path / "whole")
    torch.testing.assert_close(outputs(bare, inputs), expected)
    bare.save_pretrained(tmp_path / "bare")
    assert not any(k.startswith("bert.") for k in load_file(tmp_path / "bare/adapter.safetensors"))
    back = PeftModel.from_pretrained(world.base(), tmp_path / "bare")
    torch.testing.assert_close(original.outputs(back, "bert"), world.expected("double_seq_bn"))


def test_named_configs_are_its_own() -> None:
    """Also as older files name them; and without a version, by older names of functions."""
    raw = hub("llama").cases["par_bn"]["config"]
    for name in ("parallel", "par_bn"):
        config = config_from_dict(raw | {"config": name})
        expected = config_from_dict(raw | {"config": raw["config"] | {"reduction_factor": 2}})
        assert config == dataclasses.replace(expected)
    old = {k: v for k, v in raw.items() if k != "version"}
    old["config"] = raw["config"] | {"non_linearity": "gelu"}
    assert config_from_dict(old).non_linearity == "gelu_new"
    assert BottleneckConfig.preset("scaled_par_bn").scaling == "learned"
    assert BottleneckConfig.preset("pfeiffer", reduction_factor=4) == BottleneckConfig(
        reduction_factor=4
    )
    assert BottleneckConfig.preset("houlsby") == BottleneckConfig.preset("double_seq_bn")
    with pytest.raises(UnsupportedError, match=r"config: 'compacter' is not one of .*, houlsby, "):
        BottleneckConfig.preset("compacter")
    defaults = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4,
                "non_linearity": "relu"}  # fmt: skip
    assert config_from_dict(raw | {"config": defaults}).original_ln_before is False


def test_its_config_and_ours_have_one_digest(tmp_path: Path) -> None:
    """What is trained differently is served alike; what is computed differently is not."""
    world = hub("llama")
    base = BaseModel.from_model(world.base())

    def digest(**changes: Any) -> str:
        raw = world.cases["seq_bn"]["config"]
        config = config_from_json(json.dumps(raw | {"config": raw["config"] | changes}))
        return compile_adapter(config, TensorReader(world.adapter("seq_bn")), base).digest

    assert digest() == digest(dropout=0.3, init_weights="houlsby", stochastic_depth=0.1)
    assert digest() == digest(phm_dim=2)
    assert digest() != digest(non_linearity="gelu")


# -- several adapters --------------------------------------------------------------------------

OTHERS = {
    "llama": ["o_proj", "down_proj", "q_proj"],
    "gpt2": ["c_proj", "c_attn"],
    "bert": ["query", "dense"],
}
MIXED = ["seq_bn", "norms", "open-parallel", "learned"]


def together(world: Hub, tmp_path: Path) -> PeftModel:
    """Bottlenecks of several kinds and a LoRA inside of the modules that they wrap."""
    made = PeftModel.from_pretrained(world.base(), world.save(MIXED[0], tmp_path / "0"), MIXED[0])
    for i, case in enumerate(MIXED[1:], 1):
        made.load_adapter(world.save(case, tmp_path / str(i)), case)
    torch.manual_seed(9)
    targets = OTHERS[world.model]
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=targets, use_dora=True)
    made.add_adapter("lora", lora)
    return made.eval()


@pytest.mark.parametrize("model", list(OTHERS))
def test_rows_of_one_batch_go_through_different_adapters(model: str, tmp_path: Path) -> None:
    world = hub(model)
    made = together(world, tmp_path)
    names = ["norms", "lora", "__base__", "learned", "seq_bn", "open-parallel", "norms"]
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 48, (len(names), 6), generator=generator)
    mixed = outputs(made, {"input_ids": ids}, adapter_names=names)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1]}
        if name == "__base__":
            expected = outputs(world.base(), one)
        else:
            made.set_adapter(name)
            expected = outputs(made, one)
        torch.testing.assert_close(mixed[row], expected[0], atol=1e-5, rtol=1e-5)
    assert not made._context.streams


@pytest.mark.parametrize("model", list(OTHERS))
def test_adapters_come_and_go_inside_of_each_other(model: str, tmp_path: Path) -> None:
    world = hub(model)
    made = together(world, tmp_path)
    made.set_adapter("seq_bn")
    torch.testing.assert_close(
        original.outputs(made, model), world.expected("seq_bn"), atol=1e-5, rtol=0
    )
    for name in ("lora", *MIXED[1:]):
        made.delete_adapter(name)
    got = original.outputs(made, model)
    torch.testing.assert_close(got, world.expected("seq_bn"), atol=1e-5, rtol=0)
    expected = original.outputs(world.base(), model)
    assert torch.equal(original.outputs(made.unload(), model), expected)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    made = together(hub("llama"), tmp_path)
    with pytest.raises(ValueError, match="do not add up"):
        made.set_adapter(["seq_bn", "norms"])
    with pytest.raises(MixtureError, match="BOTTLENECK"):
        made.add_weighted_adapter(["seq_bn", "norms"], [0.5, 0.5], "mixed")
    with pytest.raises(MixtureError, match="BOTTLENECK"):
        check_mixture([("seq_bn", Bottleneck.adds, "BOTTLENECK")], [0.5])


@pytest.mark.parametrize("model", list(OTHERS))
def test_merging_is_refused_and_changes_nothing(model: str, tmp_path: Path) -> None:
    world = hub(model)
    made = PeftModel.from_pretrained(world.base(), world.save("learned", tmp_path))
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(UnsupportedError, match=r"bottleneck at .* no weight expresses it"):
            merge()
    torch.testing.assert_close(
        original.outputs(made, model), world.expected("learned"), atol=1e-5, rtol=0
    )


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(model: str, reentrant: bool) -> None:
    world = hub(model)
    gradients = []
    for checkpointing in (False, True):
        made = new_adapter(world, "norms").train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        made(**original.batch(model)).loss.backward()
        found = {n: p.grad for n, p in made.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in found.values())
        gradients.append(found)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(model: str, tmp_path: Path) -> None:
    world = hub(model)
    made = PeftModel.from_pretrained(world.base(), world.save("learned", tmp_path))
    ids = original.batch(model)["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(8):
        ids = torch.cat([ids, outputs(made, {"input_ids": ids})[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_a_bottleneck_in_float32_on_a_base_in_bfloat16() -> None:
    world = hub("llama")
    made = random_adapter(
        world.base().bfloat16(), BottleneckConfig.preset("par_bn", mh_adapter=True), 0
    )
    exact = random_adapter(world.base(), BottleneckConfig.preset("par_bn", mh_adapter=True), 0)
    exact.load_state_dict(made.state_dict())
    got = original.outputs(made, "llama").float()
    assert got.isfinite().all()
    torch.testing.assert_close(got, original.outputs(exact, "llama"), atol=0.3, rtol=0.1)


def test_weights_are_loaded_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    world = hub("bert")
    made = new_adapter(world, "norms")
    original.train(made, "bert")
    made.save_pretrained(tmp_path)
    expected = original.outputs(made, "bert")
    other = new_adapter(world, "norms").eval()
    assert (original.outputs(other, "bert") - expected).abs().max() > 1e-3
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(original.outputs(other, "bert"), expected)


# -- served ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "case"), CASES)
def test_compiled_and_packed_it_computes_the_same(model: str, case: str) -> None:
    """One sequence of a packed batch, between rows of the base and of another adapter."""
    world = hub(model)
    made = world.base()
    base = BaseModel.from_model(made)
    host = attach(made, base)
    config = config_from_dict(world.cases[case]["config"])
    assert isinstance(config, BottleneckConfig)
    program = compile_adapter(config, TensorReader(world.adapter(case)), base)
    assert {type(p) for p in program.primitives} == {Bottleneck}
    assert not program.adds
    packed = pack(program, torch.float32)
    adapter = bind(packed.digest, packed.layout, packed.data, 0)
    ids = original.batch(model)["input_ids"][:1]
    segments = [Segment(0, ids.shape[1], adapter)]
    host.batch = AdapterBatch(segments, segments)
    expected = world.expected(case)[:1]
    torch.testing.assert_close(outputs(made, {"input_ids": ids}), expected, atol=1e-5, rtol=0)
    host.batch = AdapterBatch()
    base_alone = outputs(world.base(), {"input_ids": ids})
    assert torch.equal(outputs(made, {"input_ids": ids}), base_alone)
    assert not host.streams


# -- refusals ----------------------------------------------------------------------------------


def raw_config(**changes: Any) -> dict[str, Any]:
    raw = hub("llama").cases["seq_bn"]["config"]
    return raw | {"config": raw["config"] | changes}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"phm_layer": True}, "phm_layer"),
        ({"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}, "inv_adapter"),
        ({"use_gating": True}, "use_gating"),
        ({"cross_adapter": True}, "cross_adapter"),
        ({"architecture": "lora"}, "architecture"),
        ({"architecture": "prefix_tuning"}, "architecture"),
        ({"architecture": "union", "configs": []}, "architecture"),
        ({"non_linearity": "prelu"}, "non_linearity"),
        ({"non_linearity": "sine"}, "non_linearity"),
        ({"MH_Adapter": True}, "MH_Adapter"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        config_from_dict(raw_config(**changes))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mh_adapter": False, "output_adapter": False}, "output_adapter"),
        ({"residual_before_ln": "post_add", "original_ln_before": False}, "residual_before_ln"),
        ({"residual_before_ln": "sometimes"}, "residual_before_ln"),
        ({"scaling": "big"}, "scaling"),
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"reduction_factor": 1e-300}, "reduction_factor"),
        ({"non_linearity": ["relu"]}, "non_linearity"),
        ({"leave_out": ["1"]}, "leave_out"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(raw_config(**changes))
    assert error.value.field == field


def test_a_config_that_is_not_whole_is_refused() -> None:
    raw = raw_config()
    for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        inner = {k: v for k, v in raw["config"].items() if k != key}
        with pytest.raises(ConfigError, match=f"{key}: required"):
            config_from_dict(raw | {"config": inner})
    with pytest.raises(ConfigError, match="name: required"):
        config_from_dict({k: v for k, v in raw.items() if k != "name"})
    for given in (None, 3, [], "mam", "seq_bn_inv", "lora"):
        with pytest.raises(ConfigError, match="config"):
            config_from_dict(raw | {"config": given})
    with pytest.raises(ConfigError, match="name"):
        config_from_dict(raw | {"name": "a.b"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction_factor": {"7": 2}}, "reduction_factor: neither layer 0 nor a default"),
        ({"leave_out": [0, 1]}, "leave_out: no layer is left"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln: post_add needs a norm"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    world = hub("llama")
    with pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(world.base(), world.save("seq_bn", tmp_path, **changes))


def test_another_base_is_refused(tmp_path: Path) -> None:
    folder = hub("llama").save("seq_bn", tmp_path)
    with pytest.raises(ConfigError, match=r"model_type: .*'llama'.*'gpt2'"):
        PeftModel.from_pretrained(hub("gpt2").base(), folder)
    with pytest.raises(ConfigError, match=r"hidden_size: .*16.*64"):
        PeftModel.from_pretrained(tiny.llama(), folder)
    with pytest.raises(UnsupportedError, match=r"gemma3_text.*bert, .*gpt2, .*llama, "):
        get_peft_model(tiny.gemma3(), BottleneckConfig())


@pytest.mark.parametrize("damage", ["missing", "left over", "shape", "two names"])
def test_a_file_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    world = hub("llama")
    folder = world.save("norms", tmp_path)
    tensors = world.adapter("norms")
    key = f"model.layers.1.output_adapters.adapters.{NAME}.adapter_up.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "left over":
        key = f"model.layers.2.output_adapters.adapters.{NAME}.adapter_up.weight"
        tensors[key] = torch.ones(16, 4)
    elif damage == "shape":
        tensors[key] = torch.ones(16, 5)
    else:
        key = f"model.layers.1.output_adapters.adapters.{NAME}.adapter_norm_before.weight"
        tensors[key] = torch.ones(16)
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(world.base(), folder)
    assert error.value.key == key


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    world = hub("bert")
    folder = world.save("seq_bn", tmp_path)
    (folder / "pytorch_model_head.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model_head.bin: .*use_safetensors=True"):
        PeftModel.from_pretrained(world.base(), folder)
    (folder / "pytorch_model_head.bin").unlink()
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_adapter.bin: .*use_safetensors=True"):
        PeftModel.from_pretrained(world.base(), folder)


def test_a_head_of_its_own_classes_is_refused(tmp_path: Path) -> None:
    world = hub("bert")
    folder = world.save("seq_bn", tmp_path)
    save_file({"heads.tuned.1.weight": torch.ones(3, 16)}, folder / "model_head.safetensors")
    (folder / "head_config.json").write_text('{"config": {"head_type": "classification"}}')
    with pytest.raises(UnsupportedError, match=r"head_config.json: .*without the head's files"):
        PeftModel.from_pretrained(world.base(), folder)


@pytest.mark.parametrize("case", ["two-layers", "on-the-pooler", "transformers"])
def test_a_head_that_transformers_has_is_read_with_the_adapter(case: str, tmp_path: Path) -> None:
    files, expected = headed(case)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    loaded = PeftModel.from_pretrained(hub("bert").base(), tmp_path)
    logits = original.outputs(loaded, "bert")[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_stochastic_depth_is_served_but_not_trained(tmp_path: Path) -> None:
    world = hub("llama")
    folder = world.save("seq_bn", tmp_path, stochastic_depth=0.1)
    loaded = PeftModel.from_pretrained(world.base(), folder)
    torch.testing.assert_close(
        original.outputs(loaded, "llama"), world.expected("seq_bn"), atol=1e-5, rtol=0
    )
    with pytest.raises(UnsupportedError, match="stochastic_depth"):
        get_peft_model(world.base(), BottleneckConfig(stochastic_depth=0.1))


def test_modules_that_are_trained_whole_are_saved_beside(tmp_path: Path) -> None:
    """A language model's head, and one of the backbone."""
    world = hub("llama")
    config = BottleneckConfig(reduction_factor=4, modules_to_save=["lm_head", "model.norm"])
    made = random_adapter(world.base(), config, 3)
    made.save_pretrained(tmp_path)
    heads = load_file(tmp_path / "model_head.safetensors")
    assert heads.keys() == {"lm_head.weight", "model.norm.weight"}
    again = PeftModel.from_pretrained(world.base(), tmp_path)
    assert again.active_peft_config.modules_to_save == ["lm_head", "model.norm"]
    expected = original.outputs(made, "llama")
    torch.testing.assert_close(original.outputs(again, "llama"), expected, atol=1e-6, rtol=0)
    made = random_adapter(world.base(), BottleneckConfig(reduction_factor=4), 3)
    made.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*head*"))
