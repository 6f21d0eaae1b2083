"""Parameter-efficient adapters: PEFT's API and files, compiled to programs that can be batched.

Models to train come when they are first asked for: transformers' Trainer, which is taught of them,
brings a tenth of a gigabyte that serving has no use for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftcore.config import (
    AdapterConfig,
    TaskType,
    config_from_dict,
    config_from_json,
    supported_methods,
)
from peftcore.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MixtureError,
    UnsupportedError,
)
from peftcore.methods import (
    AdaLoraConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)

if TYPE_CHECKING:
    from peftcore.export import export_task
    from peftcore.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        get_peft_model_state_dict,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )

#: PEFT's name of the class that every config derives from.
PeftConfig = AdapterConfig

__all__ = [
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterError",
    "BottleneckConfig",
    "CheckpointError",
    "ConfigError",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MixtureError",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "TaskType",
    "TrainableTokensConfig",
    "UnsupportedError",
    "VeraConfig",
    "config_from_dict",
    "config_from_json",
    "export_task",
    "get_peft_model",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
    "supported_methods",
]

#: Name → the module that it is imported from, at its first use.
_LAZY = {
    "export_task": "peftcore.export",
    "PeftModel": "peftcore.model",
    "PeftModelForCausalLM": "peftcore.model",
    "PeftModelForFeatureExtraction": "peftcore.model",
    "PeftModelForSequenceClassification": "peftcore.model",
    "PeftModelForTokenClassification": "peftcore.model",
    "get_peft_model": "peftcore.model",
    "get_peft_model_state_dict": "peftcore.model",
    "prepare_model_for_kbit_training": "peftcore.model",
    "set_peft_model_state_dict": "peftcore.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
