"""One file a method: its config, its keys in PEFT's files, its compilation to primitives.

To add a method: a config class with `compile`, decorated with `register`, imported here.
"""

from peftcore.methods.ia3 import IA3Config
from peftcore.methods.lora import LoraConfig
from peftcore.methods.prefix_tuning import PrefixTuningConfig
from peftcore.methods.prompt_tuning import PromptEncoderConfig, PromptTuningConfig

__all__ = [
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
]
