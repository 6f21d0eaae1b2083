"""The public names of peftcore, and of each of its packages, exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import peft
import pytest

import peftcore
from peftcore import errors, refusals

MODULES = ["peftcore", *(m.name for m in pkgutil.walk_packages(peftcore.__path__, "peftcore."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_public_name_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "a module says what it does"
    public = getattr(module, "__all__", [])
    assert len(public) == len(set(public))
    for symbol in public:
        assert getattr(module, symbol, None) is not None, symbol


def test_what_peftcore_exports() -> None:
    assert set(peftcore.__all__) == {
        "AdapterConfig", "PeftConfig", "PeftType", "TaskType", "config_from_dict",
        "config_from_json", "get_peft_config", "supported_methods",
        "AdaLoraConfig", "BottleneckConfig", "IA3Config", "LNTuningConfig", "LoHaConfig",
        "LoKrConfig", "LoraConfig", "MultitaskPromptTuningConfig", "OFTConfig",
        "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "TrainableTokensConfig",
        "VeraConfig",
        "MultitaskPromptTuningInit", "PromptEncoderReparameterizationType", "PromptTuningInit",
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
        "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
        "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
        "export_task", "get_peft_model", "get_peft_model_state_dict", "load_peft_weights",
        "prepare_model_for_kbit_training", "set_peft_model_state_dict",
        "AdapterError", "CheckpointError", "ConfigError", "MixtureError", "UnsupportedError",
    }  # fmt: skip
    assert peftcore.__all__ == sorted(peftcore.__all__)


def is_config_of_a_method(name: str) -> bool:
    method = name.removesuffix("Config").upper()
    return name.endswith("Config") and method in {t.value.replace("_", "") for t in peft.PeftType}


@pytest.mark.parametrize("name", sorted(filter(is_config_of_a_method, peft.__all__)))
def test_every_method_of_peft_is_there_or_refused_at_its_import(name: str) -> None:
    if name in peftcore.__all__:
        return
    with pytest.raises(ImportError, match=f"peftcore has no {name}: .* is not supported: .*: "):
        exec(f"from peftcore import {name}")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("BOFTModel", "merge it"),
        ("inject_adapter_in_model", "get_peft_model"),
        ("AutoPeftModelForSeq2SeqLM", "CAUSAL_LM"),
        ("PeftMixedModel", "PeftModel"),
        ("LoftQConfig", "start LoRA without"),
        ("LoraModel", "get_peft_model"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(name: str, instead: str) -> None:
    assert hasattr(peft, name)
    with pytest.raises(ImportError, match=instead):
        getattr(peftcore, name)


def test_a_name_that_nobody_has() -> None:
    assert not hasattr(peftcore, "LoraBananaConfig")


def test_enumerations_have_pefts_values() -> None:
    for ours in (
        peftcore.TaskType,
        peftcore.PromptTuningInit,
        peftcore.MultitaskPromptTuningInit,
        peftcore.PromptEncoderReparameterizationType,
    ):
        theirs = getattr(peft, ours.__name__)
        assert {m.name: m.value for m in ours} == {m.name: m.value for m in theirs}
    assert sorted(peftcore.PeftType) == peftcore.supported_methods()
    assert {m.value for m in peft.PeftType} == (
        {*peftcore.PeftType} - {"BOTTLENECK"} | refusals.METHODS.keys()
    )


def test_there_is_one_tree_of_errors() -> None:
    """Drawn in errors.py as it is."""
    found = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
    ]
    assert all(issubclass(c, errors.AdapterError) for c in found)
    assert errors.__doc__ is not None
    drawing = errors.__doc__.splitlines()
    for error in found:
        assert any(error.__name__ in line for line in drawing), error
        assert error.__name__ in peftcore.__all__
