"""Checkpoints saved quantized by transformers and bitsandbytes: their codes are served as they are.

The oracle is transformers' own model over the floats that the stored codes stand for, which are
worked out here from the file by the formats' definitions: bitsandbytes 0.50's own nf4 on a CPU is
wrong where a width is no multiple of 64.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from peftcore.errors import UnsupportedError
from peftcore.ops import VARIABLE
from peftcore.quant import QuantLinear, adopt_codes
from server import plan as plan_module
from server.build import assemble
from server.memory import base_bytes
from server.models.loader import LoadedModel, load_model
from server.models.probe import UnservableModel
from server.plan import make_plan
from server.settings import Settings
from tests import tiny
from tests.peftcore.worlds import quiet
from tests.recorder import Recorder, compare

CPU = torch.device("cpu")
CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "nf4-storage": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "nf4-head": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[]
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8-skipped": BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["lm_head", "down_proj"]
    ),
}


def saved(folder: Path, config: BitsAndBytesConfig, **changes: Any) -> PreTrainedModel:
    """The float model whose quantized form is in `folder` then; 96 is no multiple of 64."""
    model = tiny.llama(num_hidden_layers=2, **changes)
    model.save_pretrained(folder / "float")
    with quiet():
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "float", quantization_config=config, dtype=torch.float32
        )
        quantized.save_pretrained(folder / "quantized")
    return model


def stored_weight(tensors: dict[str, Tensor], path: str, shape: torch.Size) -> Tensor | None:
    """What the file's codes of a layer stand for; None where it has floats."""
    codes = tensors[f"{path}.weight"]
    if f"{path}.SCB" in tensors:
        return codes.float() * tensors[f"{path}.SCB"].float()[:, None] / 127
    state = tensors.get(f"{path}.weight.quant_state.bitsandbytes__nf4")
    if state is None:
        return None
    about = json.loads(bytes(state.tolist()))
    absmax = tensors[f"{path}.weight.absmax"]
    if "nested_blocksize" in about:
        scales = tensors[f"{path}.weight.nested_absmax"].repeat_interleave(
            about["nested_blocksize"]
        )
        values = tensors[f"{path}.weight.nested_quant_map"][absmax.long()]
        absmax = values * scales[: len(absmax)] + about["nested_offset"]
    data = codes.reshape(-1).view(torch.uint8)
    table = tensors[f"{path}.weight.quant_map"]
    values = table[torch.stack([data >> 4, data & 15], 1).view(-1).long()][: shape.numel()]
    return (values * absmax.repeat_interleave(64)[: shape.numel()]).view(shape)


def dequantized(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """The model over the stored codes' values; and the layers that have such."""
    model, tensors = copy.deepcopy(model), load_file(folder / "quantized" / "model.safetensors")
    found = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = stored_weight(tensors, path, module.weight.shape)
            if weight is not None:
                assert not torch.equal(weight, module.weight), path
                module.weight.data = weight
                found.append(path)
    return model, found


def difference(
    loaded: LoadedModel,
    expected: PreTrainedModel,
    folder: Path,
    adapter: Path | None = None,
) -> float:
    """Of a served answer's logits from those of transformers, or of HF peft, over `expected`."""
    runtime = assemble(tiny.settings(folder / "data"), loaded, tiny.tokenizer(), "tiny")
    parts = []
    if adapter is not None:
        tiny.register(runtime, "a", adapter)
        parts = [(adapter, 1.0)]
    recorder = Recorder(runtime)
    with runtime.adapters.lease("tiny" if adapter is None else "a") as lease:
        seq = recorder.add("request", [5, 77, 123, 9, 201, 4], lease)
    recorder.run()
    runtime.close()
    return compare(recorder, seq, tiny.PeftOracle(expected, parts))


@pytest.mark.parametrize("kernels", [None, "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_stored_codes(
    name: str, kernels: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels is not None:
        monkeypatch.setenv(VARIABLE, kernels)
    model = saved(tmp_path, CONFIGS[name])
    expected, paths = dequantized(model, tmp_path)
    assert len(paths) in (12, 14, 15)
    with quiet():
        loaded = load_model(tmp_path / "quantized", "none", CPU, "float")
    assert loaded.quantization == name.partition("-")[0]
    layers = {p for p, m in loaded.model.named_modules() if isinstance(m, QuantLinear)}
    assert {path.replace(".base", "") for path in layers} == set(paths)
    assert difference(loaded, expected, tmp_path) < 2e-4


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_codes_are_not_made_anew(name: str, tmp_path: Path) -> None:
    """Quantizing what codes stand for need not give them again; the output embedding is."""
    model = saved(tmp_path, CONFIGS[name])
    expected, paths = dequantized(model, tmp_path)
    with quiet():
        loaded = load_model(tmp_path / "quantized", "int8", CPU)
    for path, module in loaded.base.modules.items():
        if path in paths:
            weight = expected.get_submodule(path).weight
            torch.testing.assert_close(module.weight(), weight, atol=1e-6, rtol=1e-6)
    head = loaded.base.modules["lm_head"].module
    assert isinstance(head, QuantLinear)
    assert head.quantization == "int8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "quant_type fp4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quantized by gptq"),
        ({"quant_method": "fp8"}, "quantized by fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True,
          "llm_int8_has_fp16_weight": True}, "has_fp16_weight"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    """Before anything is loaded; and what to do is said."""
    if isinstance(config, BitsAndBytesConfig):
        saved(tmp_path, config)
    else:
        folder = tmp_path / "quantized"
        model = tiny.llama(num_hidden_layers=1)
        model.save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | {"quantization_config": config}))
    with pytest.raises(UnservableModel, match=f"(?s){message}.*--quantization nf4 or int8"):
        load_model(tmp_path / "quantized", "int8", CPU)


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["nf4"])
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    layer = model.model.layers[0].mlp.up_proj
    weight = torch.randn(layer.out_features, layer.in_features)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    layer.weight.data, layer.weight.quant_state = codes, state
    with pytest.raises(UnsupportedError, match=r"model.layers.0.mlp.up_proj: nf4 in blocks of 128"):
        adopt_codes(model)


def test_an_adapter_over_a_stored_base(tmp_path: Path) -> None:
    """Against HF peft over the same values."""
    model = saved(tmp_path, CONFIGS["nf4-double"])
    expected, _ = dequantized(model, tmp_path)
    with quiet():
        loaded = load_model(tmp_path / "quantized", "none", CPU, "float")
    config = tiny.peft_configs("llama")["lora-r8-all"]
    path = tiny.save_random_adapter(model, config, tmp_path / "a")
    assert difference(loaded, expected, tmp_path, path) < 2e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_check_knows_what_it_takes(name: str, tmp_path: Path) -> None:
    """Parameters and buffers of the loaded model; `none` leaves its output embedding alone."""
    saved(tmp_path, CONFIGS[name])
    tiny.hf_tokenizer().save_pretrained(tmp_path / "quantized")
    given = Settings(
        model=str(tmp_path / "quantized"), quantization="none", device="cpu",
        data_dir=tmp_path / "data", kv_memory="1MiB",
    )  # fmt: skip
    plan = make_plan(given)
    assert plan.facts["quantization"] == name.partition("-")[0]
    with quiet():
        loaded = load_model(tmp_path / "quantized", "none", CPU)
    reckoned = plan_module._stored_bytes(
        plan_module._tensors(tmp_path / "quantized"), torch.float32
    )
    # In tiles some outputs are filled up.
    assert reckoned == pytest.approx(base_bytes(loaded.model), rel=0.06)
