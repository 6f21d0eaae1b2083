"""From a model folder to a model that serves: loaded, quantized, probed, adapters attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftcore.base import BaseModel
from peftcore.errors import UnsupportedError
from peftcore.layers import AdapterHost, AdapterModule, attach
from peftcore.memory import MappedFiles
from peftcore.ops import select, uses_triton
from peftcore.quant import (
    Activations,
    Quantization,
    adopt_codes,
    fast_activations,
    quantize_model,
    round_activations,
    stored_quantization,
)
from peftcore.tasks import Tasks
from server.models.attention import NAME, TORCH_NAME
from server.models.fused import bind, fuse, unfuse
from server.models.probe import (
    AttentionCall,
    UnservableModel,
    check_config,
    eager_outputs,
    is_encoder,
    observe,
    position_offset,
    probe,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A resident base model.

    Attributes:
        base: what adapters are compiled against.
        host: where a step's adapters are set.
        tasks: what adapters of every task are compiled against, and their heads.
        pooler: what an encoder's pooled output is made by, taken out of the model; or None.
        position_offset: of an encoder, which position its first token has.
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
    tasks: Tasks
    pooler: nn.Module | None = None
    position_offset: int = 0

    @property
    def is_encoder(self) -> bool:
        """Does it compute hidden states alone, each from its whole sequence?"""
        return not self.tasks.generates


def load_model(
    folder: Path,
    quantization: Quantization,
    device: torch.device,
    activations: Activations | None = None,
) -> LoadedModel:
    """Load a causal language model, or an encoder, from a local folder.

    Float32 weights are mapped, not read: then no more than one of them is in RAM beside the codes.

    Args:
        quantization: of a checkpoint of float weights. One that bitsandbytes has quantized keeps
            its codes; then this says of its output embedding alone whether it is.
        activations: of quantized layers; None chooses what is fast.

    Raises:
        UnservableModel: the paged attention does not serve this architecture right, or the
            checkpoint is quantized in a way that is not served.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = AutoConfig.from_pretrained(folder)
    cls = AutoModelForCausalLM if generates(config) else AutoModel
    loading: Any = cls.from_pretrained  # mypy knows of one result only
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if kept_quantization(folder, config) is not None:
        options["device_map"] = {"": str(device)}  # where bitsandbytes makes its layers
    model, info = loading(folder, **options)
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    if others := {path for path in missing if not path.startswith("pooler.")}:
        raise UnservableModel(f"{folder}: holds no weights of {', '.join(sorted(others))}")
    release = MappedFiles(folder).release
    return prepare_model(model, quantization, device, activations, release, missing)


def kept_quantization(folder: Path, config: PretrainedConfig) -> Quantization | None:
    """How the checkpoint was quantized when it was saved; None where its weights are floats.

    Raises:
        UnservableModel: in a way that is not served.
    """
    try:
        return stored_quantization(config)
    except UnsupportedError as exc:
        raise UnservableModel(f"{folder}: {exc}") from None


def generates(config: PretrainedConfig) -> bool:
    """Is it a language model, as far as its config says?"""
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return not config.architectures or bool(classes & set(config.architectures))


def prepare_model(
    model: PreTrainedModel,
    quantization: Quantization,
    device: torch.device,
    activations: Activations | None = None,
    after_each: Callable[[], object] = lambda: None,
    missing: Collection[str] = (),
) -> LoadedModel:
    """Make a model in memory ready to serve; changes it in place.

    Args:
        after_each: as for `quantize_model`.
        missing: modules that the model's files hold no weights of.

    Raises as `load_model`.
    """
    check_config(model)
    model.eval().requires_grad_(False)
    try:
        is_stored = adopt_codes(model, after_each)
    except UnsupportedError as exc:
        raise UnservableModel(f"{type(model).__name__}: {exc}") from None
    model.to(device)  # type: ignore[arg-type]
    quantize_model(model, quantization, after_each, output_alone=is_stored)
    if is_stored:
        quantization = stored_quantization(model.config) or quantization
    model.set_attn_implementation(NAME)
    calls = observe(model)
    kv_shapes = [call.kv_shape for call in calls]
    _make_faster(model, calls)
    on_codes = quantization != "none" and device.type == "cpu"
    chosen = (activations or fast_activations()) if on_codes else "float"
    round_activations(model, chosen)  # last: rounding would hide from the probe what it looks for
    base = BaseModel.from_model(model, kv_shapes)
    tasks = Tasks(model, base, missing=missing)
    host = attach(model, base)
    bind(model, host)
    offset = position_offset(model)
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
        max_position_embeddings=config.max_position_embeddings - offset,
        tasks=tasks,
        pooler=_take_pooler(model) if is_encoder(model) else None,
        position_offset=offset,
    )


def _take_pooler(model: PreTrainedModel) -> nn.Module | None:
    """Take an encoder's pooler out: in a packed batch it would pool the first row alone.

    Its wrapped modules are given one row of each sequence then, as an output embedding's are.
    """
    pooler: nn.Module | None = getattr(model, "pooler", None)
    if pooler is not None:
        model.pooler = None  # type: ignore[assignment]
        for module in pooler.modules():
            if isinstance(module, AdapterModule):
                module.is_output = True
    return pooler


def _make_faster(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
    """Put faster modules in, where the model computes the same with them.

    Raises:
        UnservableModel: it does not compute right with its own modules either.
    """
    kv_shapes = [call.kv_shape for call in calls]
    expected = eager_outputs(model)
    if uses_triton(model.device):
        try:
            return probe(model, kv_shapes, expected)
        except Exception as exc:  # whatever a compiler makes of shapes that it has not seen
            logger.warning("torch attends in Triton's place, slower: %s", exc)
            model.set_attn_implementation(TORCH_NAME)
    elif model.device.type == "cpu" and model.dtype == torch.float32 and select(model.device):
        replaced = fuse(model, {call.layer: call for call in calls})
        try:
            return probe(model, kv_shapes, expected)
        except Exception as exc:  # whatever an unknown architecture makes of them
            logger.warning("the model keeps its own modules: %s", exc)
            unfuse(model, replaced)
    probe(model, kv_shapes, expected)


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = None
    if getattr(model, "generation_config", None) is not None:  # an encoder has none
        eos = model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
