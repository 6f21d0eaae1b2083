"""`PeftModel`: PEFT's public API over one frozen base and any number of adapters of any methods.

A person who knows HF `peft` finds the same names here. What is different: adapters of several
methods may be on one model at once, every adapter has its own copies of what it trains (biases
too), a file that does not fit is an error and never a warning, and unmerging is exact.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from peftcore import hf_trainer, prompted
from peftcore.adapter_set import NO_CHECKPOINTING, AdapterSet
from peftcore.checkpoint import peft_format
from peftcore.checkpoint.reader import PREFIX
from peftcore.config import AdapterConfig
from peftcore.errors import UnsupportedError
from peftcore.parts import Parts, ReplacedModule
from peftcore.quant import is_quantized
from peftcore.refusals import TASKS

#: Embeddings by their usual names: PEFT saves them beside an adapter that targets them.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")

#: Fields of configs that train some rows of an embedding: PEFT saves no embedding beside those.
_ROWS_FIELDS = ("token_indices", "trainable_token_indices")


class PeftModel(PushToHubMixin, AdapterSet):
    """A base model with adapters: files, calls and training, by PEFT's names.

    `push_to_hub` is transformers', of what `save_pretrained` writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        """Wrap `model`, whose own weights are frozen, and add one adapter.

        Raises:
            ConfigError, UnsupportedError: the config does not fit the model.
        """
        only(kwargs, LOADING)
        super().__init__(model)
        self.add_adapter(adapter_name, peft_config)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    # -- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters in PEFT's files: `default` to the folder, others to one of their name.

        Args:
            state_dict: accepted for PEFT's sake; the adapters' own tensors are written.
            dtype: of the written tensors; by default their own.
            kwargs: `max_shard_size`, accepted for the sake of `push_to_hub`: one file is written.

        Raises:
            ValueError: pickles are asked for, or an adapter is unknown.
        """
        only(kwargs, {"max_shard_size"})
        if not safe_serialization:
            raise ValueError("safe_serialization: only safetensors files are written")
        if not is_main_process:
            return
        for name in selected_adapters or list(self.peft_config):
            self._known(name)
            folder = Path(save_directory)
            folder = folder if name == "default" else folder / name
            tensors = self._file_tensors(name, save_embedding_layers)
            tensors = {k: v.to(dtype or v.dtype) for k, v in tensors.items()}
            config = dataclasses.replace(
                self._saved_config(name), inference_mode=True, auto_mapping=self._mapping(name)
            )
            peft_format.write(folder, config, tensors, self._parts[name])

    def _saved_config(self, name: str) -> AdapterConfig:
        """The config as it is written: what training changed of it included."""
        return self.peft_config[name].trained(self._parts[name])

    def _mapping(self, name: str) -> dict[str, str] | None:
        """The base's class where no task says it: what PEFT's AutoPeftModel goes by."""
        if self.peft_config[name].task_type is not None:
            return None
        model = type(self.get_base_model())
        return {"base_model_class": model.__name__, "parent_library": model.__module__}

    def _file_tensors(self, name: str, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """The adapter's tensors, and the base's own embeddings where PEFT saves them too."""
        tensors = peft_format.state_dict(self._parts[name])
        config, at = self.peft_config[name], {p.module.path: p for p in self._parts[name].modules}
        targets = getattr(config, "target_modules", None)
        if isinstance(targets, str):
            replaced = {path for path, part in at.items() if isinstance(part, ReplacedModule)}
            targets = [path.rsplit(".", 1)[-1] for path in at.keys() - replaced]
        is_target = any(n in (targets or ()) for n in _EMBEDDING_NAMES)
        if save_embedding_layers == "auto":
            trains_rows = any(getattr(config, field, None) is not None for field in _ROWS_FIELDS)
            save_embedding_layers = is_target and not trains_rows
        if not save_embedding_layers or config.is_prompt_learning:
            return tensors
        for module in self.base.embeddings:
            part = at.get(module.path)
            if isinstance(part, ReplacedModule) or (part is None and is_target):
                continue
            own = {"weight": module.weight(), "bias": module.bias()}
            if not is_quantized(module.module):
                own = dict(module.module.named_parameters(recurse=False))
            for leaf, value in own.items():
                key = f"{PREFIX}{module.path}.{leaf}"
                if part is not None:
                    key = part.file_key(f"base_layer.{leaf}")
                if value is not None:
                    tensors.setdefault(key, value)  # a trained bias is there already
        return tensors

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with an adapter from PEFT's files.

        Raises:
            FileNotFoundError: no such folder or hub repository.
            ConfigError, UnsupportedError, CheckpointError: the adapter does not fit the model.
            ValueError: the model has adapters already.
        """
        only(kwargs, LOADING)
        folder = peft_format.locate(model_id, subfolder, **_download(kwargs))
        config = config or peft_format.read_config(folder)
        chosen = _class_for(config, cls)
        made = chosen.__new__(chosen)
        AdapterSet.__init__(made, model)
        made._load_new(folder, adapter_name, config, is_trainable)
        made.set_adapter(adapter_name, inference_mode=not is_trainable)
        return made.train(is_trainable)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load an adapter beside the others, or new weights into one that is there.

        Raises: as `from_pretrained`; nothing is changed then.
        """
        only(kwargs, LOADING)
        folder = peft_format.locate(model_id, subfolder, **_download(kwargs))
        if adapter_name in self.peft_config:
            self._load_into(folder, adapter_name)
        else:
            config = peft_format.read_config(folder)
            self._load_new(folder, adapter_name, config, is_trainable)
        if not is_trainable:
            self.eval()

    def _load_new(self, folder: Path, name: str, config: AdapterConfig, is_trainable: bool) -> None:
        tensors = peft_format.read_tensors(folder, config)

        def fill(parts: Parts) -> None:
            trains = is_trainable and parts.prompt is not None and parts.prompt.encoder_state()
            encoder = copy.deepcopy(parts.prompt) if trains else None
            parts.load(tensors)
            tensors.finish()
            if encoder is not None:
                parts.prompt = encoder.to_empty(device="cpu")
                peft_format.read_encoder(folder, encoder)

        self._add(name, dataclasses.replace(config, inference_mode=not is_trainable), fill)

    def _load_into(self, folder: Path, name: str) -> None:
        """New weights for an adapter that is there, into the parameters that it has."""
        tensors = peft_format.read_tensors(folder, self.peft_config[name])
        config = self.peft_config[name].as_saved(peft_format.read_config(folder))
        with torch.device("meta"):
            check = config.build(self.base)
        check.load(tensors)
        tensors.finish()
        parts = self._parts[name]
        prompt = parts.prompt
        if prompt is not None and prompt.encoder_state():
            encoder = copy.deepcopy(prompt)
            peft_format.read_encoder(folder, encoder)
            prompt.load_state_dict(encoder.state_dict())
            parts = dataclasses.replace(parts, prompt=None)
        parts.load(tensors.again())

    # -- computing -------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's forward, with the active adapters.

        Args:
            adapter_names: for each sequence of the batch the adapter that it goes through, or
                "__base__"; adapters of any methods that have no prompt.
            task_ids: `[batch]`, under multitask prompt tuning.
        """
        if adapter_names is not None:
            with self._mixed(adapter_names, _given(args, kwargs)):
                return self.base_model(*args, **kwargs)
        prompt = self._active_prompt()
        if prompt is not None:
            return prompted.forward(self, prompt, task_ids, *args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        if getattr(outputs, "loss", None) is not None:
            term = self.regularization()
            if term is not None:
                outputs.loss = outputs.loss + term
        return outputs

    def regularization(self) -> Tensor | None:
        """What the active adapters' methods add to the loss (AdaLoRA); already in `forward`'s."""
        if not self._context.enabled:
            return None
        found = [
            term
            for name in self._context.active
            if (term := self.peft_config[name].regularization(self._parts[name])) is not None
        ]
        return torch.stack(found).sum() if found else None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's generate, with the active adapters (or `adapter_names`)."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            with self._mixed(names, _given(args, kwargs)):
                return self.base_model.generate(*args, **kwargs)
        prompt = self._active_prompt()
        if prompt is not None:
            return prompted.generate(self, prompt, *args, **kwargs)
        return self.base_model.generate(*args, **kwargs)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The active prompt: `[batch, n, hidden]`, or for a prefix a cache that holds it."""
        prompt = self._active_prompt()
        if prompt is None:
            raise ValueError("the active adapter has no prompt")
        return prompted.prompt_of(self, prompt, batch_size, task_ids)

    # -- training --------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, counted as PEFT counts them."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        # An adapter's bias stands in the place of the base's: PEFT trains that one itself.
        for parts in self._parts.values():
            total -= sum(part.num_replaced() for part in parts.modules)
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's; its inputs then require gradients, for its weights do not.

        Raises:
            ValueError: the active adapter is a prefix, whose cache the recomputation would change.
        """
        if any(p.prompt is not None and p.prompt.is_kv for p in self._parts.values()):
            raise ValueError(NO_CHECKPOINTING)
        self.base_model.model.activation_checkpointing_enable(*args, **kwargs)
        self.base_model.model.enable_input_require_grads()

    #: The name that PEFT's users know.
    gradient_checkpointing_enable = activation_checkpointing_enable

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; each has its own head."""


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; each has its own head."""


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""


_BY_TASK: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "CAUSAL_LM": PeftModelForCausalLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

#: Arguments of a download from the hub.
DOWNLOAD = {"revision", "token", "cache_dir", "local_files_only"}

#: Arguments of PEFT's that change how loading is done and not what comes out: adapters are float32,
#: on the base's device.
LOADING = DOWNLOAD | {
    "adapter_name",
    "autocast_adapter_dtype",
    "device_map",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
    "torch_device",
    "use_safetensors",
}


def only(kwargs: Mapping[str, Any], known: set[str]) -> None:
    """Raises TypeError where there are other arguments than those."""
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{name}: not an argument here; known are {', '.join(sorted(known))}")


def _download(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k in DOWNLOAD}


def _class_for(config: AdapterConfig, cls: type[PeftModel] = PeftModel) -> type[PeftModel]:
    if config.task_type is not None and config.task_type not in _BY_TASK:
        instead = f"; {TASKS[config.task_type]}" if config.task_type in TASKS else ""
        raise UnsupportedError(
            "task_type", f"{config.task_type!r} is not one of {', '.join(_BY_TASK)}{instead}"
        )
    return _BY_TASK.get(config.task_type or "", PeftModel) if cls is PeftModel else cls


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The sequences of a call."""
    for value in (*args[:1], *(kwargs.get(k) for k in ("input_ids", "inputs", "inputs_embeds"))):
        if value is not None:
            return cast(Tensor, value)
    raise ValueError("input_ids: required")


def get_peft_model(
    model: PreTrainedModel,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a new adapter, of the class that the config's `task_type` says.

    Args:
        mixed, autocast_adapter_dtype, low_cpu_mem_usage: accepted for PEFT's sake: adapters of any
            methods may be on one model, and are float32.
        revision: of the base on the hub, where it is not the main one: noted in the config.

    Raises:
        ConfigError, UnsupportedError: the config does not fit the model.
        ValueError: the model has adapters already.
    """
    made = _class_for(peft_config)(model, peft_config, adapter_name)
    if revision is not None:
        made.peft_config[adapter_name].revision = revision
    return made


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> PreTrainedModel:
    """Make a quantized model ready to train adapters on.

    Args:
        auto_clear_cache: accepted for PEFT's sake.

    Everything is frozen, what is not quantized becomes float32, and gradients reach the inputs.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        if half and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(
            gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    return model


hf_trainer.install(PeftModel)
