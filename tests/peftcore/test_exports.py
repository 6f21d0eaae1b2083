"""The public names of peftcore, and of each of its packages, exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import peftcore
from peftcore import errors

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
        "AdapterConfig", "PeftConfig", "TaskType", "config_from_dict", "config_from_json",
        "supported_methods",
        "AdaLoraConfig", "BottleneckConfig", "IA3Config", "LNTuningConfig", "LoHaConfig",
        "LoKrConfig", "LoraConfig", "MultitaskPromptTuningConfig", "OFTConfig",
        "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "TrainableTokensConfig",
        "VeraConfig",
        "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
        "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
        "export_task", "get_peft_model", "get_peft_model_state_dict",
        "prepare_model_for_kbit_training", "set_peft_model_state_dict",
        "AdapterError", "CheckpointError", "ConfigError", "MixtureError", "UnsupportedError",
    }  # fmt: skip
    assert peftcore.__all__ == sorted(peftcore.__all__)


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
