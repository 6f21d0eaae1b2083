"""How the base and the cache are kept, as the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.ops.cpu import kernels
from peftcore.quant import QuantLinear, fast_activations
from server.build import SetupError, build_runtime
from server.settings import Settings
from tests import tiny
from tests.recorder import Recorder


def settings(folder: Path, data: Path, **changes: Any) -> Settings:
    return Settings(
        model=str(folder), data_dir=data, kv_memory="1MiB", adapter_memory="1MiB", device="cpu",
        **changes,
    )  # fmt: skip


def logits(tmp_path: Path, **changes: Any) -> Tensor:
    """Of six greedy tokens after one prompt."""
    runtime = tiny.runtime(tiny.llama(), tmp_path, **changes)
    try:
        recorder = Recorder(runtime)
        with runtime.adapters.lease("tiny") as lease:
            seq = recorder.add("one", list(range(3, 40)), lease, max_tokens=6)
        recorder.run()
        return torch.stack(recorder.logits[seq.key])
    finally:
        runtime.close()


@pytest.mark.parametrize("activations", ["auto", "float", "int16", "int8"])
def test_activations_are_those_that_were_asked_for(
    model_folder: Path, tmp_path: Path, activations: str
) -> None:
    given = settings(model_folder, tmp_path, quantization="int8", activations=activations)
    runtime = build_runtime(given)
    expected = fast_activations() if activations == "auto" else activations
    layers = [m for m in runtime.engine.runner.loaded.model.modules() if isinstance(m, QuantLinear)]
    runtime.close()
    assert runtime.facts["activations"] == expected
    assert {layer.activations for layer in layers} == {expected}


def test_activations_are_rounded_only_beside_codes(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="--activations int8: needs a quantized base"):
        build_runtime(settings(model_folder, tmp_path, quantization="none", activations="int8"))
    plain = build_runtime(settings(model_folder, tmp_path, quantization="none"))
    plain.close()
    assert plain.facts["activations"] == "float"


def test_auto_is_a_form_that_this_cpu_multiplies_fast() -> None:
    fast = kernels() is not None and kernels().CAPABILITY.endswith(("VNNI", "AMX"))
    assert fast_activations() == ("int16" if fast else "float")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_rounded_activations_change_logits_by_little(tmp_path: Path, quantization: str) -> None:
    """More than nothing, less with sixteen bits than with eight."""
    found = {
        form: logits(tmp_path / form, quantization=quantization, activations=form)
        for form in ("float", "int16", "int8")
    }
    errors = {form: float((found[form] - found["float"]).abs().max()) for form in found}
    scale = float(found["float"].std())
    assert 0 < errors["int16"] < errors["int8"] < 0.5 * scale  # the model is small and random
    if quantization == "int8":  # nf4's table is rounded with either
        assert errors["int16"] < 1e-3 * scale


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_half_cache_changes_logits_by_little(tmp_path: Path, quantization: str) -> None:
    whole = logits(tmp_path / "whole", quantization=quantization)
    half = logits(tmp_path / "half", quantization=quantization, kv_cache_dtype="float16")
    assert 0 < float((half - whole).abs().max()) < 5e-3 * float(whole.std())


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_auto_is_a_half_cache_beside_codes(tmp_path: Path, quantization: str) -> None:
    runtime = tiny.runtime(
        tiny.llama(), tmp_path, quantization=quantization, kv_cache_dtype="auto"
    )  # fmt: skip
    runtime.close()
    half = quantization == "int8" and kernels() is not None
    assert runtime.facts["kv_cache_dtype"] == ("float16" if half else "float32")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_auto_rounds_adapters_beside_codes(tmp_path: Path, quantization: str) -> None:
    """They are off by as little as a base's codes are, and take half of what halves take."""
    model = tiny.llama()
    lora = tiny.peft_configs("llama")["lora-r8-all"]
    folder = tiny.save_random_adapter(model, lora, tmp_path / "adapter", scale=0.08)
    found, sizes, facts = {}, {}, {}
    for dtype in ("float", "auto", "int8"):
        given: dict[str, Any] = {"quantization": quantization, "adapter_dtype": dtype}
        runtime = tiny.runtime(model, tmp_path / dtype, **given)
        try:
            config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
            info, _ = runtime.adapters.register("poet", config.read_bytes(), weights)
            recorder = Recorder(runtime)
            for name, key in (("tiny", "base"), ("poet", dtype)):
                with runtime.adapters.lease(name) as lease:
                    seq = recorder.add(key, list(range(3, 40)), lease, max_tokens=1)
                recorder.run()
                (found[key],) = recorder.logits[seq.key]
            sizes[dtype] = info.num_bytes
            facts[dtype] = runtime.facts["adapter_dtype"]
        finally:
            runtime.close()
    rounded = kernels() is not None and quantization != "none"
    assert facts == {"float": "float", "auto": "int8" if rounded else "float", "int8": "int8"}
    assert torch.equal(found["auto"], found["int8" if rounded else "float"])
    assert sizes["auto"] == sizes["int8" if rounded else "float"]
    assert sizes["int8"] < 0.5 * sizes["float"]
    error = float((found["int8"] - found["float"]).norm())
    assert 0 < error < 0.03 * float((found["float"] - found["base"]).norm())


def test_what_cannot_read_rounded_adapters_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYPEFT_OPS", "triton")
    with pytest.raises(SetupError, match=r"--adapter-dtype int8: .* triton"):
        tiny.runtime(tiny.llama(), tmp_path, adapter_dtype="int8")


def test_a_half_cache_holds_twice_as_much(tmp_path: Path) -> None:
    blocks = {}
    for dtype in ("auto", "float32", "float16"):
        runtime = tiny.runtime(tiny.llama(), tmp_path / dtype, kv_cache_dtype=dtype)
        blocks[dtype] = runtime.stats()["kv_blocks"]
        runtime.close()
    assert blocks["auto"] == blocks["float32"]
    assert blocks["float16"] == 2 * blocks["float32"]
