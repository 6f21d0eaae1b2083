"""Parameter-efficient adapters: PEFT's API and files, compiled to programs that can be batched."""

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
from peftcore.export import export_task
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
