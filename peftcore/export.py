"""Adapters as files of another method, which says the same. Knows no training and no serving."""

from __future__ import annotations

from pathlib import Path

import torch

from peftcore.checkpoint import peft_format
from peftcore.methods.prompt_tuning import (
    MultitaskPrompt,
    MultitaskPromptTuningConfig,
    PromptTuningConfig,
)
from peftcore.model import PeftModel
from peftcore.parts import PROMPT_KEY, Parts
from peftcore.weights import get_peft_model_state_dict

#: Fields of a multitask config that say how its training starts, and how many tasks there are.
_ONLY_MULTITASK = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    "num_ranks",
    "num_tasks",
)


def export_task(
    model: PeftModel, task: int, folder: str | Path, adapter_name: str = "default"
) -> None:
    """Save one task of a multitask prompt as a PROMPT_TUNING adapter, which can be served.

    Args:
        task: its number, as in `task_ids`.
        folder: where both files are written.

    Raises:
        ValueError: the adapter is no multitask prompt, or has no such task.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, MultitaskPromptTuningConfig):
        raise ValueError(f"adapter_name: {adapter_name!r} is no MULTITASK_PROMPT_TUNING adapter")
    prompt = model.prompt_encoder[adapter_name]
    assert isinstance(prompt, MultitaskPrompt)
    num_tasks = len(prompt.prefix_task_cols)
    if not 0 <= task < num_tasks:
        raise ValueError(f"task: {task}, but {adapter_name!r} has the tasks 0 to {num_tasks - 1}")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for name, _ in prompt.saved():
        del tensors[name]
    with torch.no_grad():
        tensors[PROMPT_KEY] = prompt.task_rows(task)
    values = {k: v for k, v in config.to_dict().items() if k not in ("peft_type", *_ONLY_MULTITASK)}
    exported = PromptTuningConfig(**(values | {"inference_mode": True}))
    peft_format.write(Path(folder), exported, tensors, Parts())
