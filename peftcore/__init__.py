"""Parameter-efficient adapters: PEFT's API and files, compiled to programs that can be batched.

Models to train come when they are first asked for: transformers' Trainer, which is taught of them,
brings a tenth of a gigabyte that serving has no use for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftcore.config import (
    AdapterConfig,
    PeftType,
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
    MultitaskPromptTuningInit,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TrainableTokensConfig,
    VeraConfig,
)
from peftcore.refusals import refusal_of

if TYPE_CHECKING:
    from peftcore.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from peftcore.export import export_task
    from peftcore.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from peftcore.weights import (
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )

#: PEFT's names of the class that every config derives from, and of what makes one of a mapping.
PeftConfig = AdapterConfig
get_peft_config = config_from_dict

__all__ = [
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
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
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "TrainableTokensConfig",
    "UnsupportedError",
    "VeraConfig",
    "config_from_dict",
    "config_from_json",
    "export_task",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
    "supported_methods",
]

#: Name → the module that it is imported from, at its first use.
_LAZY = {
    "AutoPeftModel": "peftcore.auto",
    "AutoPeftModelForCausalLM": "peftcore.auto",
    "AutoPeftModelForFeatureExtraction": "peftcore.auto",
    "AutoPeftModelForSequenceClassification": "peftcore.auto",
    "AutoPeftModelForTokenClassification": "peftcore.auto",
    "export_task": "peftcore.export",
    "PeftModel": "peftcore.model",
    "PeftModelForCausalLM": "peftcore.model",
    "PeftModelForFeatureExtraction": "peftcore.model",
    "PeftModelForSequenceClassification": "peftcore.model",
    "PeftModelForTokenClassification": "peftcore.model",
    "get_peft_model": "peftcore.model",
    "get_peft_model_state_dict": "peftcore.weights",
    "load_peft_weights": "peftcore.weights",
    "prepare_model_for_kbit_training": "peftcore.model",
    "set_peft_model_state_dict": "peftcore.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        refusal = refusal_of(name)
        if refusal is not None:
            raise ImportError(f"peftcore has no {name}: {refusal}", name=__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
