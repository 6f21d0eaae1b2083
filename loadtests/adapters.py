"""Random LoRA adapters of a model's shapes, for load tests: real files, meaningless weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from peftcore import LoraConfig
from peftcore.base import BaseModel
from peftcore.checkpoint.reader import PREFIX
from peftcore.config import WEIGHTS_NAME


def make_lora(model_folder: Path, folder: Path, *, rank: int, seed: int) -> Path:
    """Write a LoRA of `rank` on all linear layers of the model to `folder`; returns it.

    Args:
        model_folder: what holds the model's config.json; its weights are not read.
        rank: of every module. seed: of the weights, so that adapters differ.
    """
    config = AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        base = BaseModel.from_model(AutoModelForCausalLM.from_config(config))
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in (target.module for target in lora.targets(base)):
        a = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        b = torch.randn(module.out_features, rank, generator=generator) * 0.01
        tensors[f"{PREFIX}{module.path}.lora_A.weight"] = a.to(torch.float16)
        tensors[f"{PREFIX}{module.path}.lora_B.weight"] = b.to(torch.float16)
    lora.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    return folder
