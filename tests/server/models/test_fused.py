"""A layer in one launch computes what the model's own modules do, and what they do apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore.ops.cpu import kernels
from peftcore.quant import Activations, Quantization
from server.models.attention import NAME
from server.models.fused import FusedAttention, FusedLayer, FusedRMSNorm, fuse, unfuse
from server.models.loader import prepare_model
from server.models.probe import observe
from tests import tiny
from tests.recorder import Recorder, compare
from tests.server.models import zoo

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler: there are no kernels")

#: Methods of which the kernels do all.
KNOWN = ["lora-r4", "lora-r8-all", "dora", "lora_bias", "ia3", "prefix", "prompt"]
#: And those of which they do not.
UNKNOWN = ["oft", "lora-saved"]


def layers_of(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
)
def test_layers_of_the_usual_kinds_are_fused(name: str) -> None:
    """The start-up probe has compared them with eager attention then, over codes as over floats."""
    loaded = prepare_model(zoo.make(name, zoo.SERVED[name]), "int8", torch.device("cpu"), "float")
    assert len(layers_of(loaded.model)) == 2


@pytest.mark.parametrize("name", ["olmo2", "cohere", "glm4", "qwen3_moe", "gpt2"])
def test_layers_that_add_up_otherwise_are_not(name: str) -> None:
    loaded = prepare_model(zoo.make(name, zoo.SERVED[name]), "int8", torch.device("cpu"), "float")
    assert not layers_of(loaded.model)


def test_a_layer_is_asked_and_not_known_by_its_parts() -> None:
    """A residual multiplier is no part; with one of 1 the layer is as llama's."""
    config = zoo.SERVED["granite"] | {"residual_multiplier": 1.0}
    for multiplier, found in ((1.0, 2), (0.5, 0)):
        model = zoo.make("granite", config | {"residual_multiplier": multiplier})
        loaded = prepare_model(model, "int8", torch.device("cpu"), "float")
        assert len(layers_of(loaded.model)) == found


def test_unfuse_puts_every_module_back() -> None:
    model = tiny.gemma3()
    model.set_attn_implementation(NAME)
    calls = observe(model)
    before = dict(model.named_modules())
    replaced = fuse(model, {call.layer: call for call in calls})
    kinds = {type(module) for module in model.modules()}
    assert {FusedLayer, FusedAttention, FusedRMSNorm} <= kinds
    assert [p for p, _ in model.named_parameters()] == [
        p for p, _ in tiny.gemma3().named_parameters()
    ]
    unfuse(model, replaced)
    assert dict(model.named_modules()) == before


# -- with adapters ---------------------------------------------------------------------------------


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """With weights that int8 codes hold as they are: what peft computes with them is exact."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            steps = weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
            module.weight.data = (weight / steps).round() * steps
    return model


def served(
    model: PreTrainedModel,
    folder: Path,
    names: list[str],
    quantization: Quantization = "int8",
    activations: Activations = "float",
) -> tuple[Recorder, dict[str, Path]]:
    """A recorder around a runtime with these methods' random adapters."""
    runtime = tiny.runtime(
        model, folder / "data", max_num_batched_tokens=48, quantization=quantization,
        activations=activations,
    )  # fmt: skip
    configs = tiny.peft_configs(model.config.model_type)
    paths = {}
    for seed, name in enumerate(names):
        paths[name] = tiny.save_random_adapter(model, configs[name], folder / name, seed)
        tiny.register(runtime, name, paths[name])
    return Recorder(runtime), paths


def ask(recorder: Recorder, names: list[str]) -> None:
    """Requests of all of them and of the base at once, whose prompts are cut into chunks."""
    recorder.load(*names)
    for i, name in enumerate(["tiny", *names]):
        with recorder.runtime.adapters.lease(name) as lease:
            recorder.add(name, [(i * 7 + k * k) % 256 for k in range(5 + 9 * i)], lease)
    recorder.run()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_mixed_batch_in_whole_layers_equals_peft_alone(architecture: str, tmp_path: Path) -> None:
    model = rounded(getattr(tiny, architecture)())
    recorder, paths = served(model, tmp_path, KNOWN)
    try:
        kernels().take_layer_seconds()
        ask(recorder, KNOWN)
        assert kernels().take_layer_seconds()["linear"] > 0, "no layer was computed in one launch"
        sequences = {c.seq.key: c.seq for b in recorder.batches for c in b.chunks}
        for (name, _), seq in sequences.items():
            oracle = tiny.PeftOracle(model, [(paths[name], 1.0)] if name in paths else [])
            assert compare(recorder, seq, oracle) < 1e-4, name
    finally:
        recorder.runtime.close()


@pytest.mark.parametrize(
    ("architecture", "quantization", "activations"),
    [("llama", "int8", "int16"), ("gemma3", "int8", "float"), ("gemma3", "nf4", "int16")],
)
def test_whole_layers_and_their_parts_give_the_same_bits(
    architecture: str,
    quantization: Quantization,
    activations: Activations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of adapters that the kernels know are compared with a server's that never computes a
    layer in one launch; an adapter that they do not know changes no other's result."""
    model = getattr(tiny, architecture)()

    def logits(folder: str, names: list[str]) -> dict[str, Tensor]:
        recorder, _ = served(model, tmp_path / folder, names, quantization, activations)
        try:
            kernels().take_layer_seconds()
            ask(recorder, names)
            return {name: torch.stack(rows) for (name, _), rows in recorder.logits.items()}
        finally:
            recorder.runtime.close()

    whole = logits("whole", KNOWN)
    assert kernels().take_layer_seconds()["linear"] > 0, "no layer was computed in one launch"
    mixed = logits("mixed", [*KNOWN, *UNKNOWN])
    monkeypatch.setattr(FusedLayer, "_launch", lambda self: None)
    apart = logits("apart", KNOWN)
    assert kernels().take_layer_seconds()["linear"] == 0
    for name, rows in whole.items():
        assert torch.equal(rows, apart[name]), name
        torch.testing.assert_close(
            rows, mixed[name], atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
