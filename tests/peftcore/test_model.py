"""`PeftModel`: adapters added, switched, mixed, loaded and removed; what is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from peftcore import (
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    UnsupportedError,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peftcore.tuner import AdapterLayer
from tests import tiny
from tests.peftcore.worlds import quiet

#: peft's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(5))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options))


def randomized(model: PeftModel, seed: int = 0) -> PeftModel:
    """Weights that matter, in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parts in model._parts.values():
        for part in parts.all():
            for parameter in part.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise, alpha=0.2)
    return model.eval()


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def several() -> PeftModel:
    """Adapters of several methods on one base."""
    model = get_peft_model(tiny.llama(), lora(), "lora")
    model.add_adapter("wide", lora(r=7, target_modules="all-linear"))
    model.add_adapter("dora", lora(use_dora=True))
    model.add_adapter("ia3", IA3Config(task_type="CAUSAL_LM"))
    model.add_adapter("bias", lora(bias="all"))
    model.add_adapter("head", lora(modules_to_save=["lm_head"]))
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    return randomized(model)


NAMES = ["lora", "wide", "dora", "ia3", "bias", "head", "prefix", "prompt"]
LAYERED = NAMES[:6]


def test_adapters_of_several_methods_do_not_touch_each_other(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path)
    for name in NAMES:
        alone = PeftModel.from_pretrained(tiny.llama(), tmp_path / name)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(alone), atol=1e-5, rtol=1e-5, msg=name)
        in_peft = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / name).eval()
        torch.testing.assert_close(logits(model), logits(in_peft), atol=2e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.llama()))
    before = logits(model)
    model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(tiny.llama()))
    model.enable_adapter_layers()
    assert torch.equal(logits(model), before)


def test_a_batch_of_several_adapters_is_each_alone() -> None:
    """`adapter_names`, which peft has for LoRA only."""
    model = several()
    names = ["ia3", "lora", "lora", "__base__", "dora", "head", "bias", "wide"]
    ids = torch.randint(0, 256, (8, 9), generator=torch.Generator().manual_seed(6))
    mixed = logits(model, ids, adapter_names=names)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, adapter_names=names)
    for i, name in enumerate(names):
        row = ids[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, row)
                tokens = model.generate(row, max_new_tokens=4, do_sample=False)
        else:
            model.set_adapter(name)
            alone = logits(model, row)
            tokens = model.generate(row, max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=2e-5, rtol=1e-5)
        assert torch.equal(generated[i : i + 1], tokens)


def test_what_adapter_names_refuses() -> None:
    model = several()
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        logits(model, adapter_names=["lora", "nobody", "lora", "lora"])
    with pytest.raises(ValueError, match="'prefix' has a prompt"):
        logits(model, adapter_names=["prefix", "lora", "lora", "lora"])
    with pytest.raises(ValueError, match="adapter_names: 3 names for 4 sequences"):
        logits(model, adapter_names=["lora"] * 3)
    assert model._context.owners is None


def test_gradients_reach_the_active_adapter_only() -> None:
    model = several().train()
    for name in NAMES:
        model.set_adapter(name)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for other in NAMES:
            grads = [p.grad for part in model._parts[other].all() for p in part.parameters()]
            reached = [g is not None and bool(g.abs().sum() > 0) for g in grads]
            assert any(reached) == (other == name), (name, other)
        assert all(
            p.grad is None for p in model.get_base_model().parameters() if not p.requires_grad
        )


def test_several_lora_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    model = randomized(get_peft_model(tiny.llama(), lora(), "a"))
    model.add_adapter("b", lora(r=6, lora_alpha=3))
    randomized(model, 1).save_pretrained(tmp_path)
    model.set_adapter(["a", "b"])
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(model), logits(theirs), atol=2e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(theirs), atol=5e-5, rtol=1e-5)


def test_deleting_gives_the_modules_back() -> None:
    model = get_peft_model(tiny.llama(), lora(target_modules=["q_proj"]), "a")
    model.add_adapter("b", lora(target_modules=["v_proj"]))
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    wrapped = [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)]
    assert len(wrapped) == 3
    assert all(name.endswith("v_proj") for name in wrapped)
    with pytest.raises(ValueError, match="the only adapter"):
        model.delete_adapter("b")
    base = model.unload()
    assert not any(isinstance(m, AdapterLayer) for m in base.modules())
    assert torch.equal(logits(base), logits(tiny.llama()))


def test_the_class_follows_the_task() -> None:
    assert type(get_peft_model(tiny.llama(), lora())) is PeftModelForCausalLM
    assert (
        type(get_peft_model(tiny.llama(), lora(task_type=TaskType.CAUSAL_LM)))
        is PeftModelForCausalLM
    )
    assert type(get_peft_model(tiny.llama(), lora(task_type=None))) is PeftModel
    config = LoraConfig(task_type="SEQ_CLS")
    model = get_peft_model(tiny.bert(), config)
    assert type(model) is PeftModelForSequenceClassification
    assert model.modules_to_save == {"classifier", "score"}
    assert config.modules_to_save is None, "the caller's config is not changed"
    with pytest.raises(UnsupportedError, match=r"'SEQ_2_SEQ_LM' is not one of .*; .*CAUSAL_LM"):
        get_peft_model(tiny.llama(), lora(task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(UnsupportedError, match=r"'QUESTION_ANS' is not one of .*; train TOKEN_CLS"):
        get_peft_model(tiny.bert(), LoraConfig(task_type=TaskType.QUESTION_ANS))


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    theirs: Any = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"a config of peftcore is expected, not peft.*LoraConfig"):
        get_peft_model(tiny.llama(), theirs)
    model = get_peft_model(tiny.llama(), lora())
    with pytest.raises(TypeError, match="push_to_hub: not an argument here"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert not any(tmp_path.iterdir())


def test_the_adapter_alone_is_pushed_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny.llama(), lora())
    model.add_adapter("other", lora(r=2))
    pushed: dict[str, int] = {}

    def upload(self: Any, folder: str, repo_id: str, **_: Any) -> str:
        assert repo_id == "me/mine"
        files = [p for p in Path(folder).rglob("*") if p.is_file()]
        pushed.update({str(p.relative_to(folder)): p.stat().st_size for p in files})
        return "done"

    hub = transformers.utils.hub
    repo = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "hf_api", lambda: repo)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("hello"))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    assert model.push_to_hub("me/mine") == "done"
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert pushed.keys() == {"README.md", *files, *(f"other/{name}" for name in files)}
    assert pushed["adapter_model.safetensors"] < 4 * 4 * 3 * 1000, "not the base"


def test_classifiers_keep_their_own_heads(tmp_path: Path) -> None:
    """Two tasks on one encoder: `load_adapter`, then `set_adapter`, as peft does it."""
    for name in ("a", "b"):
        one = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS"), name)
        randomized(one, len(name) + ord(name)).save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny.bert(), tmp_path / "a", "a")
    ours.load_adapter(tmp_path / "b", "b")
    theirs = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    seen = []
    for name in ("a", "b", "a"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
        seen.append(logits(ours))
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    mixed = logits(ours, adapter_names=["a", "b", "b", "__base__"])
    torch.testing.assert_close(mixed[:1], seen[0][:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:3], seen[1][1:3], atol=1e-5, rtol=1e-5)


def test_the_line_of_trainable_parameters_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(tiny.llama(), lora()).print_trainable_parameters()
    ours = capsys.readouterr().out
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.llama(), config).print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: ")


def test_state_dicts_are_pefts(tmp_path: Path) -> None:
    model = randomized(get_peft_model(tiny.llama(), lora()))
    state = get_peft_model_state_dict(model)
    other = get_peft_model(tiny.llama(), lora())
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other.eval()), logits(model))
    theirs = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).eval()
    peft.set_peft_model_state_dict(theirs, state)
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path)
    again = get_peft_model(tiny.llama(), lora(), revision="v2")
    set_peft_model_state_dict(again, load_peft_weights(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(again.eval()), logits(model))
    assert again.peft_config["default"].revision == "v2"
    key = next(iter(state))
    before = logits(other)
    with pytest.raises(CheckpointError, match="missing"):
        set_peft_model_state_dict(other, {k: v + 1 for k, v in state.items() if k != key})
    with pytest.raises(CheckpointError, match="no module of the base model takes this key"):
        set_peft_model_state_dict(other, {**{k: v + 1 for k, v in state.items()}, "x": state[key]})
    assert torch.equal(logits(other), before), "a refused state changes nothing"


# -- files that are refused ------------------------------------------------------------------------


def saved(tmp_path: Path, config: PeftConfig | None = None) -> Path:
    randomized(get_peft_model(tiny.llama(), config or lora())).save_pretrained(tmp_path)
    return tmp_path / tiny.WEIGHTS_NAME


def test_a_wrong_file_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path)
    key = next(k for k in tensors if "q_proj" in k)
    model = get_peft_model(tiny.llama(), lora(), "first").eval()
    before, layers = logits(model), len(list(model.named_modules()))
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != key}, "missing"),
        (
            {**tensors, "base_model.model.x": tensors[key].clone()},
            "no module of the base model takes",
        ),
        ({**tensors, key: tensors[key][:, :-1].contiguous()}, "shape"),
        ({**tensors, key: tensors[key] * float("nan")}, "not finite"),
        ({**tensors, key: tensors[key].to(torch.int32)}, "dtype"),
    ]:
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter(tmp_path, "second")
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter(tmp_path, "first")
        assert list(model.peft_config) == ["first"]
        assert len(list(model.named_modules())) == layers
        assert torch.equal(logits(model), before)


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: a pickle .*can run code.*again"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "nowhere" / "at" / "all")


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("", "a.b", "__base__"):
        with pytest.raises(ValueError, match="adapter_name"):
            get_peft_model(tiny.llama(), lora(), name)
    model = get_peft_model(tiny.llama(), lora())
    with pytest.raises(ValueError, match="on this model already"):
        model.add_adapter("default", lora())
    with pytest.raises(ValueError, match="has adapters already"):
        get_peft_model(model, lora())  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="has adapters already"):
        PeftModel.from_pretrained(model.get_base_model(), tmp_path / "saved")
    with pytest.raises(ValueError, match="no adapter 'x' on this model"):
        model.set_adapter("x")
    with pytest.raises(TypeError, match="mystery"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path, mystery=1)


def test_what_does_not_add_up() -> None:
    model = several()
    for names in (["lora", "dora"], ["prefix", "lora"], ["head", "lora"]):
        with pytest.raises(ValueError, match="do not add up"):
            model.set_adapter(names)
    model.set_adapter(["lora", "wide"])


def test_modules_to_save_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="modules_to_save: 'lm_haed' matches no module"):
        get_peft_model(tiny.llama(), lora(modules_to_save=["lm_haed"]))
    with pytest.raises(ConfigError, match="modules_to_save"):
        get_peft_model(tiny.llama(), IA3Config(modules_to_save=["nothing"]))


# -- loading again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM",
            encoder_reparameterization_type="LSTM",
        ),
        PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8,
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["lora", "p-tuning", "p-tuning-lstm", "projected-prefix"],
)  # fmt: skip
def test_training_goes_on_where_it_was_saved(config: PeftConfig, tmp_path: Path) -> None:
    """`is_trainable=True`, and loading into an adapter that an optimizer holds."""
    model = randomized(get_peft_model(tiny.llama(), dataclasses.replace(config)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    other = get_peft_model(tiny.llama(), dataclasses.replace(config))
    held = [p for p in other.parameters() if p.requires_grad]
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert [id(p) for p in other.parameters() if p.requires_grad] == [id(p) for p in held]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in again.named_parameters() if p.requires_grad] == names
    for loaded in (again, other):
        assert loaded.training or loaded is other
        assert torch.equal(logits(loaded.eval()), logits(model))
        loaded(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_an_encoders_output_alone_cannot_go_on(tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"
    )
    tiny.save_random_adapter(tiny.llama(), config, tmp_path)
    with pytest.raises(ConfigError, match="cannot go on training"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_the_config_is_read_alone(tmp_path: Path) -> None:
    saved(tmp_path, lora(lora_alpha=11))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig)
    assert config.lora_alpha == 11
    assert config.inference_mode


# -- merging -----------------------------------------------------------------------------------


def tied(make: Any = tiny.gpt2) -> PreTrainedModel:
    model = make()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def test_merging_an_embedding_unties_the_head(tmp_path: Path) -> None:
    model = randomized(
        get_peft_model(tied(), LoraConfig(target_modules=["wte"], task_type="CAUSAL_LM"))
    )
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=5e-5, rtol=1e-5)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), before, atol=5e-5, rtol=1e-5)


def test_a_merged_model_takes_no_new_adapter() -> None:
    model = randomized(get_peft_model(tiny.llama(), lora()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("other", lora())
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.merge_adapter()
    model.unmerge_adapter()
    model.add_adapter("other", lora())


def test_values_that_are_not_finite_are_not_merged() -> None:
    model = randomized(get_peft_model(tiny.llama(), lora()))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"model.layers.0.*: the merged values are not finite"):
        model.merge_adapter()
    assert not model._unmerged


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "bias", "prefix", "prompt"])
@pytest.mark.parametrize("way", ["bfloat16 base", "autocast"])
def test_a_lower_precision_trains_nearly_as_float32(name: str, way: str) -> None:
    """Parameters and gradients stay float32."""
    losses = []
    for low in (False, True):
        model = several().train()
        model.set_adapter(name)
        if low and way == "bfloat16 base":
            adapters = {
                id(p)
                for parts in model._parts.values()
                for a in parts.all()
                for p in a.parameters()
            }
            for parameter in model.parameters():
                if id(parameter) not in adapters:
                    parameter.data = parameter.data.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and way == "autocast"):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                assert parameter.grad is not None
                assert bool(torch.isfinite(parameter.grad).all())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# -- gradient checkpointing ------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prompt"])
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = several()
        model.delete_adapter("prefix")
        model.train().set_adapter(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_a_prefix_refuses_gradient_checkpointing() -> None:
    prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    base = tiny.llama()
    base.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        get_peft_model(base, prefix)
    model = get_peft_model(tiny.llama(), prefix)
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        model.gradient_checkpointing_enable()
    wrapped = get_peft_model(base, lora())
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        wrapped.add_adapter("prefix", prefix)
    assert list(wrapped.peft_config) == ["default"]


def test_a_copy_is_independent() -> None:
    model = several()
    model.set_adapter("dora")
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    for part in other._parts["dora"].modules:
        for parameter in part.parameters():
            parameter.data.add_(1.0)
    assert not torch.equal(logits(other), logits(model))
    with quiet():
        other.merge_adapter(["lora"])
