"""One file a method: its config, its keys in PEFT's files, its compilation to primitives.

To add a method: a config class with `parts`, decorated with `register`, imported here.
"""

from peftcore.methods.adalora import AdaLoraConfig
from peftcore.methods.bottleneck import BottleneckConfig
from peftcore.methods.ia3 import IA3Config
from peftcore.methods.ln_tuning import LNTuningConfig
from peftcore.methods.loha import LoHaConfig
from peftcore.methods.lokr import LoKrConfig
from peftcore.methods.lora import LoraConfig
from peftcore.methods.oft import OFTConfig
from peftcore.methods.prefix_tuning import PrefixTuningConfig
from peftcore.methods.prompt_tuning import (
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
)
from peftcore.methods.trainable_tokens import TrainableTokensConfig
from peftcore.methods.vera import VeraConfig

__all__ = [
    "AdaLoraConfig",
    "BottleneckConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TrainableTokensConfig",
    "VeraConfig",
]
