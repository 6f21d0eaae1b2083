"""From a model folder to a model that serves: loaded, quantized, probed, adapters attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftcore.base import BaseModel
from peftcore.layers import AdapterHost, attach
from peftcore.memory import MappedFiles
from peftcore.ops.cpu import kernels
from peftcore.quant import (
    Activations,
    Quantization,
    fast_activations,
    quantize_model,
    round_activations,
)
from server.models.attention import NAME
from server.models.fused import fuse, unfuse
from server.models.probe import (
    AttentionCall,
    check_config,
    eager_logits,
    observe,
    probe,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A resident base model.

    Attributes:
        base: what adapters are compiled against.
        host: where a step's adapters are set.
        eos_token_ids: tokens that end a sequence, from the model's generation config.
        max_position_embeddings: the longest context that the model was made for.
    """

    model: PreTrainedModel
    base: BaseModel
    host: AdapterHost
    quantization: Quantization
    activations: Activations
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int


def load_model(
    folder: Path,
    quantization: Quantization,
    device: torch.device,
    activations: Activations | None = None,
) -> LoadedModel:
    """Load a causal language model from a local folder.

    Float32 weights are mapped, not read: then no more than one of them is in RAM beside the codes.

    Args:
        activations: of quantized layers; None chooses what is fast.

    Raises:
        UnservableModel: the paged attention does not serve this architecture right.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    release = MappedFiles(folder).release
    return prepare_model(model, quantization, device, activations, release)


def prepare_model(
    model: PreTrainedModel,
    quantization: Quantization,
    device: torch.device,
    activations: Activations | None = None,
    after_each: Callable[[], object] = lambda: None,
) -> LoadedModel:
    """Make a model in memory ready to serve; changes it in place.

    `after_each`: as for `quantize_model`. Raises as `load_model`.
    """
    check_config(model)
    model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    quantize_model(model, quantization, after_each)
    model.set_attn_implementation(NAME)
    calls = observe(model)
    kv_shapes = [call.kv_shape for call in calls]
    _make_faster(model, calls)
    on_codes = quantization != "none" and device.type == "cpu"
    chosen = (activations or fast_activations()) if on_codes else "float"
    round_activations(model, chosen)  # last: rounding would hide from the probe what it looks for
    base = BaseModel.from_model(model, kv_shapes)
    host = attach(model, base)
    config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        base=base,
        host=host,
        quantization=quantization,
        activations=chosen,
        dtype=next(model.parameters()).dtype,
        device=device,
        eos_token_ids=_eos_token_ids(model),
        max_position_embeddings=config.max_position_embeddings,
    )


def _make_faster(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
    """Put faster modules in, where the model computes the same with them.

    Raises:
        UnservableModel: it does not compute right with its own modules either.
    """
    kv_shapes = [call.kv_shape for call in calls]
    expected = eager_logits(model)
    if model.device.type == "cpu" and model.dtype == torch.float32 and kernels() is not None:
        replaced = fuse(model, {call.layer: call for call in calls})
        try:
            return probe(model, kv_shapes, expected)
        except Exception as exc:  # whatever an unknown architecture makes of them
            logger.warning("the model keeps its own modules: %s", exc)
            unfuse(model, replaced)
    probe(model, kv_shapes, expected)


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = None
    if model.generation_config is not None:
        eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
