"""Parameter-efficient adapters, in PEFT's files, compiled to programs that can be batched."""

from peftcore.config import AdapterConfig, config_from_dict, config_from_json, supported_methods
from peftcore.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MixtureError,
    UnsupportedError,
)
from peftcore.methods import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "IA3Config",
    "LoraConfig",
    "MixtureError",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "UnsupportedError",
    "config_from_dict",
    "config_from_json",
    "supported_methods",
]
