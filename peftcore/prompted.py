"""Running a base model with a prompt before the sequence: virtual tokens, or keys and values.

Positions, masks and labels are those of PEFT: the first real token stands at position n. Knows the
model and the prompt; nothing of files or of how prompts are made.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from peftcore.parts import Prompt

if TYPE_CHECKING:
    from peftcore.model import PeftModel

#: Tasks whose labels stand at positions, so that virtual tokens need one each: one that is ignored.
_LABELS_AT_POSITIONS = ("CAUSAL_LM", "TOKEN_CLS")

IGNORED = -100


def prompt_of(peft: PeftModel, prompt: Prompt, batch: int, task_ids: Tensor | None) -> Any:
    """The prompt for a batch: `[batch, n, hidden]`, or a cache that holds its keys and values."""
    if not prompt.is_kv:
        rows = prompt.rows(task_ids)
        return rows.expand(batch, -1, -1) if rows.dim() == 2 else rows
    model = peft.get_base_model()
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)  # the config says which layers slide
    for i, (keys, values) in enumerate(prompt.kv().to(model.dtype)):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), i)
    return cache


def forward(
    peft: PeftModel,
    prompt: Prompt,
    task_ids: Tensor | None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The base model's forward with the prompt before every sequence.

    Args:
        input_ids: `[batch, len]`, or inputs_embeds `[batch, len, hidden]`.
        attention_mask: `[batch, len]`, or None for all ones.
        labels: of the sequence alone; virtual tokens get labels that are ignored.
    """
    model = peft.get_base_model()
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("input_ids: required, or inputs_embeds")
    batch, n = len(given), prompt.num_virtual_tokens
    if kwargs.pop("position_ids", None) is not None:
        warnings.warn("position_ids: not used with a prompt, which moves them", stacklevel=2)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(batch, n), attention_mask], dim=1)
    kwargs["attention_mask"] = attention_mask
    made = prompt_of(peft, prompt, batch, task_ids)
    if prompt.is_kv:
        if labels is not None:
            kwargs["labels"] = labels
        with _injected(model, made) as extra:
            return peft.base_model(
                input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs, **extra
            )
    if inputs_embeds is None:
        inputs_embeds = model.get_input_embeddings()(input_ids)
    inputs_embeds = torch.cat([made.to(inputs_embeds.dtype), inputs_embeds], dim=1)
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        kwargs["token_type_ids"] = torch.cat([types.new_zeros(batch, n), types], dim=1)
    if labels is not None:
        if peft.active_peft_config.task_type in _LABELS_AT_POSITIONS:
            labels = torch.cat([labels.new_full((batch, n), IGNORED), labels], dim=1)
        kwargs["labels"] = labels
    return peft.base_model(inputs_embeds=inputs_embeds, **kwargs)


@contextmanager
def _injected(model: PreTrainedModel, cache: DynamicCache) -> Iterator[dict[str, Any]]:
    """The cache as an argument; or, where only the backbone takes one, put into its call."""
    if "past_key_values" in inspect.signature(model.forward).parameters:
        yield {"past_key_values": cache}
        return

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": cache}

    handle = model.base_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield {}
    finally:
        handle.remove()


def generate(peft: PeftModel, prompt: Prompt, *args: Any, **kwargs: Any) -> Any:
    """The base model's generate with the prompt before every sequence.

    Returns what generate returns for the sequence alone: no virtual token is in it. Positions
    count from the attention mask, so that a row padded on the left gives what it gives alone.
    """
    model: Any = peft.get_base_model()
    task_ids = kwargs.pop("task_ids", None)
    base_prepare = model.prepare_inputs_for_generation
    n = prompt.num_virtual_tokens

    def prepare(ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = base_prepare(ids, *args, **kwargs)
        cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError("cache_implementation: only dynamic caches work with a prompt")
        tokens = inputs["input_ids"]
        batch = len(tokens)
        if mask is None:
            mask = torch.ones_like(ids)
        mask = inputs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], dim=1)
        length = tokens.shape[1]
        if cache is None or not cache.get_seq_length():
            made = prompt_of(peft, prompt, batch, task_ids)
            if prompt.is_kv:
                inputs["past_key_values"] = made
            else:
                embeds = model.get_input_embeddings()(tokens)
                inputs["inputs_embeds"] = torch.cat([made.to(embeds.dtype), embeds], dim=1)
                inputs["input_ids"] = None
                length += n
        if inputs.pop("position_ids", None) is not None:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        return inputs

    model.prepare_inputs_for_generation = prepare
    try:
        return peft.base_model.generate(*args, **kwargs)
    finally:
        del model.prepare_inputs_for_generation
