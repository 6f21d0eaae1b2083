"""`PeftModel`: PEFT's public API over one frozen base and any number of adapters of any methods.

A person who knows HF `peft` finds the same names here. What is different: adapters of several
methods may be on one model at once, every adapter has its own copies of what it trains (biases
too), a file that does not fit is an error and never a warning, and unmerging is exact.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore import hf_trainer, merge, mixing, prompted
from peftcore.base import BaseModel, BaseModule
from peftcore.checkpoint import peft_format
from peftcore.checkpoint.reader import PREFIX, TensorReader
from peftcore.config import HEAD_NAMES, AdapterConfig
from peftcore.errors import UnsupportedError
from peftcore.methods.adalora import RankAllocator
from peftcore.parts import Parts, Prompt, ReplacedModule
from peftcore.quant import is_quantized, keep_exact
from peftcore.tuner import AdapterContext, AdapterLayer, Owner

#: The name that means "no adapter" in `adapter_names`.
BASE_NAME = "__base__"

#: Embeddings by their usual names: PEFT saves them beside an adapter that targets them.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")

#: Fields of configs that train some rows of an embedding: PEFT saves no embedding beside those.
_ROWS_FIELDS = ("token_indices", "trainable_token_indices")

_CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")


class AdaptedModel(nn.Module):
    """The base with the adapters' layers in it; other attributes are the base's own."""

    #: The wrapper's: AdaLoRA's users call it here.
    update_and_allocate: Callable[[int], None]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
    """A base model with adapters.

    Attributes:
        base_model: the wrapped base; `base_model.model` is the transformers model itself.
        peft_config: adapter name → its config, complete: with what PEFT fills in from the base.
        prompt_encoder: adapter name → its prompt, for the methods that have one.
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
        _only(kwargs, _LOADING)
        self._begin(model)
        self.add_adapter(adapter_name, peft_config)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def _begin(self, model: PreTrainedModel) -> None:
        """Wrap `model`, with no adapter yet."""
        super().__init__()
        keep_exact(model)
        self.base_model = AdaptedModel(model.requires_grad_(False))
        self.base = BaseModel.from_model(model)
        self.peft_config: dict[str, AdapterConfig] = {}
        self.prompt_encoder = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self._context = AdapterContext()
        self._layers: dict[str, AdapterLayer] = {}
        self._parts: dict[str, Parts] = {}
        self._unmerged: dict[str, nn.Module] = {}
        self.base_model.update_and_allocate = self.update_and_allocate
        if self.is_gradient_checkpointing:
            model.enable_input_require_grads()

    # -- the adapters ----------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return list(self._context.active)

    @property
    def active_adapter(self) -> str:
        return self._context.active[0]

    @property
    def active_peft_config(self) -> AdapterConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in c.modules_to_save or ()}
        return names or None

    def add_adapter(
        self, adapter_name: str, peft_config: AdapterConfig, low_cpu_mem_usage: bool = False
    ) -> None:
        """Add a new adapter, initialized as PEFT does; it becomes active by `set_adapter`.

        Raises:
            ValueError: the name is taken or cannot be one.
            ConfigError, UnsupportedError: the config does not fit the model.
        """
        self._add(adapter_name, peft_config, None)

    def _add(self, name: str, config: AdapterConfig, fill: Callable[[Parts], None] | None) -> None:
        """Add an adapter, new or filled by `fill`; nothing is left of it where that fails."""
        if name in self.peft_config:
            raise ValueError(f"adapter_name: {name!r} is on this model already")
        if not name or "." in name or name == BASE_NAME:
            raise ValueError(f"adapter_name: {name!r} cannot be one (no dots, not empty)")
        if self._unmerged:
            raise ValueError("an adapter is merged: unmerge_adapter() first")
        config = self._for_task(config).completed(self.base)
        if fill is None:
            parts = config.build(self.base)
        else:
            with torch.device("meta"):
                parts = config.build(self.base)
            fill(parts)
        if parts.prompt is not None and parts.prompt.is_kv and self.is_gradient_checkpointing:
            raise ValueError(_NO_CHECKPOINTING)
        for part in parts.all():
            part.to(self.device).train(self.training)
        for part in parts.modules:
            self._layer(part.module).parts[name] = part
        if parts.prompt is not None:
            self.prompt_encoder[name] = parts.prompt
        if parts.shared is not None:
            self.shared[name] = parts.shared
        self.peft_config[name] = config
        self._parts[name] = parts
        self._set_requires_grad()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: mixing.Sign = "total",
    ) -> None:
        """Add an adapter that is a weighted sum of others. See `mixing.combine`.

        Args:
            svd_full_matrices, svd_driver: accepted for PEFT's sake; the result does not depend on
                them.

        Raises:
            MixtureError: the adapters cannot be combined like this.
            ValueError: an unknown adapter, or the name is taken.
        """
        for name in adapters:
            self._known(name)
        if len(adapters) != len(weights):
            raise ValueError(f"weights: {len(weights)} for {len(adapters)} adapters")
        sources = [
            mixing.Source(name, self.peft_config[name], self._parts[name], weight)
            for name, weight in zip(adapters, weights, strict=True)
        ]
        config, tensors = mixing.combine(
            sources, combination_type, svd_rank, svd_clamp, density, majority_sign_method
        )
        reader = TensorReader(tensors)

        def fill(parts: Parts) -> None:
            parts.load(reader)
            reader.finish()

        self._add(adapter_name, config, fill)

    def _for_task(self, config: AdapterConfig) -> AdapterConfig:
        """A classification task trains its head whole, without being told."""
        config = copy.copy(config)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self.config.name_or_path or None
        if config.task_type in _CLASSIFICATION and config.trains_head:
            names = [*(config.modules_to_save or []), *HEAD_NAMES]
            config.modules_to_save = list(dict.fromkeys(names))
        return config

    def _layer(self, module: BaseModule) -> AdapterLayer:
        """The layer at a module, put in its place where there is none yet."""
        layer = self._layers.get(module.path)
        if layer is None:
            layer = self._layers[module.path] = AdapterLayer(
                module.module, self._context, module.is_output
            )
            layer.train(module.module.training)
            _put(self.base_model.model, module.path, layer)
        return layer

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; the module of a layer that has no other gets its place back."""
        self._known(adapter_name)
        if len(self.peft_config) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use unload() instead")
        del self.peft_config[adapter_name], self._parts[adapter_name]
        for path, layer in list(self._layers.items()):
            if adapter_name in layer.parts:
                del layer.parts[adapter_name]
            if not len(layer.parts):
                _put(self.base_model.model, path, layer.base_layer)
                del self._layers[path]
        for modules in (self.prompt_encoder, self.shared):
            if adapter_name in modules:
                del modules[adapter_name]
        left = [n for n in self._context.active if n != adapter_name]
        self.set_adapter(left or next(iter(self.peft_config)))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active and trainable, or several whose updates add up.

        Raises:
            ValueError: an unknown name, or several whose effects do not compose.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        if len(names) > 1 and any(
            self._parts[n].prompt is not None or any(p.exclusive for p in self._parts[n].modules)
            for n in names
        ):
            raise ValueError(
                f"adapter_name: {names} do not add up (prompts, DoRA and whole modules act alone)"
            )
        self._context.active = names
        self._set_requires_grad(not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze or unfreeze adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            self._known(name)
            for part in self._parts[name].all():
                part.requires_grad_(requires_grad)

    def _set_requires_grad(self, active: bool = True) -> None:
        for name, parts in self._parts.items():
            for part in parts.all():
                part.requires_grad_(active and name in self._context.active)

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            known = ", ".join(map(repr, self.peft_config))
            raise ValueError(f"adapter_name: no adapter {name!r} on this model (it has {known})")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is the base alone."""
        before, self._context.enabled = self._context.enabled, False
        try:
            yield
        finally:
            self._context.enabled = before

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

        Raises:
            ValueError: pickles are asked for, or an adapter is unknown.
        """
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
            config = dataclasses.replace(self._saved_config(name), inference_mode=True)
            peft_format.write(folder, config, tensors, self._parts[name])

    def _saved_config(self, name: str) -> AdapterConfig:
        """The config as it is written: what training changed of it included."""
        return self.peft_config[name].trained(self._parts[name])

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
        """
        _only(kwargs, _LOADING)
        folder = peft_format.locate(model_id, subfolder, **_download(kwargs))
        config = config or peft_format.read_config(folder)
        chosen = _class_for(config, cls)
        made = chosen.__new__(chosen)
        made._begin(model)
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
        _only(kwargs, _LOADING)
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

    # -- merging ---------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold adapters into the base's weights, until `unmerge_adapter`.

        Args:
            adapter_names: by default the active ones.
            safe_merge: accepted for PEFT's sake: non-finite values are always refused.

        Raises:
            ValueError: an adapter is merged already, has a prompt, or its values are not finite.
            UnsupportedError: an effect that no weight expresses.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if self._unmerged:
            raise ValueError("an adapter is merged: unmerge_adapter() first")
        for name in names:
            self._known(name)
            if self._parts[name].prompt is not None:
                raise ValueError(
                    f"{name!r} ({self.peft_config[name].peft_type}) puts a prompt before the "
                    "sequence, which no weight expresses: it cannot be merged"
                )
        made: dict[str, nn.Module] = {}
        for path, layer in self._layers.items():
            parts = [part for name in names if (part := layer.part(name)) is not None]
            if parts:
                made[path] = merge.merge_parts(self.base.modules[path], parts)
        merge.retie(self.base, made)
        for path, module in made.items():
            layer = self._layers[path]
            self._unmerged[path] = layer.base_layer
            layer.base_layer = module.to(self.device)
            layer.merged = list(names)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`: the base's weights are again what they were, bit by bit."""
        for path, module in self._unmerged.items():
            self._layers[path].base_layer = module
            self._layers[path].merged = []
        self._unmerged.clear()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> PreTrainedModel:
        """The base model with the adapters folded into its weights; this wrapper is done with.

        Raises: as `merge_adapter`.
        """
        if not self._unmerged:
            self.merge_adapter(adapter_names, safe_merge)
        return self._taken_out()

    def unload(self) -> PreTrainedModel:
        """The base model as it was; this wrapper is done with."""
        self.unmerge_adapter()
        return self._taken_out()

    def _taken_out(self) -> PreTrainedModel:
        model = self.base_model.model
        for path, layer in self._layers.items():
            _put(model, path, layer.base_layer)
        merge.untie(model)
        return model

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

    def _active_prompt(self) -> Prompt | None:
        if not self._context.enabled or not self._context.active:
            return None
        return self._parts[self.active_adapter].prompt

    @contextmanager
    def _mixed(self, names: Sequence[str], inputs: Tensor) -> Iterator[None]:
        if len(names) != len(inputs):
            raise ValueError(f"adapter_names: {len(names)} names for {len(inputs)} sequences")
        owners, end = [], 0
        for name, run in itertools.groupby(names):
            start, end = end, end + len(list(run))
            if name != BASE_NAME:
                self._known(name)
                if self._parts[name].prompt is not None:
                    raise ValueError(f"adapter_names: {name!r} has a prompt, which acts alone")
            owners.append(Owner(start, end, None if name == BASE_NAME else name))
        with self.owned_by(owners, len(names)):
            yield

    @contextmanager
    def owned_by(
        self,
        owners: Sequence[Owner],
        num_units: int,
        kept: tuple[Sequence[Owner], int] | None = None,
    ) -> Iterator[None]:
        """Within, each unit of the batch goes through its owner's adapter alone.

        Args:
            owners: in order, disjoint; units in none are the base's.
            num_units: how many sequences, or tokens of a packed batch, there are.
            kept: the same for the rows that reach the output embedding (`logits_to_keep`); None:
                all do.
        """
        context = self._context
        before = context.owners, context.num_units, context.kept
        context.owners, context.num_units, context.kept = list(owners), num_units, kept
        try:
            yield
        finally:
            context.owners, context.num_units, context.kept = before

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

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation of ranks, between `backward()` and `zero_grad()` of every step.

        Raises:
            ValueError: no adapter that is active allocates ranks, or there are no gradients.
        """
        shared = [self._parts[name].shared for name in self._context.active]
        allocators = [s for s in shared if isinstance(s, RankAllocator)]
        if not allocators:
            raise ValueError(f"update_and_allocate: {self.active_adapters} are not ADALORA")
        for allocator in allocators:
            allocator.update_and_allocate(global_step)

    @property
    def is_gradient_checkpointing(self) -> bool:
        modules = self.base_model.model.modules()
        return any(getattr(module, "gradient_checkpointing", False) for module in modules)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's; its inputs then require gradients, for its weights do not.

        Raises:
            ValueError: the active adapter is a prefix, whose cache the recomputation would change.
        """
        if any(p.prompt is not None and p.prompt.is_kv for p in self._parts.values()):
            raise ValueError(_NO_CHECKPOINTING)
        self.base_model.model.activation_checkpointing_enable(*args, **kwargs)
        self.base_model.model.enable_input_require_grads()

    #: The name that PEFT's users know.
    gradient_checkpointing_enable = activation_checkpointing_enable

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model, with the adapters' layers in it."""
        return self.base_model.model

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

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

#: Arguments of PEFT's that change how loading is done and not what comes out.
_LOADING = {
    "autocast_adapter_dtype",
    "low_cpu_mem_usage",
    "ephemeral_gpu_offload",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "use_safetensors",
    "adapter_name",
}

_NO_CHECKPOINTING = (
    "PREFIX_TUNING does not work with gradient checkpointing: the recomputation would find the "
    "cache changed. Turn gradient_checkpointing off, or train another method"
)


def _only(kwargs: Mapping[str, Any], known: set[str]) -> None:
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{name}: not an argument known here")


def _download(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only")
    return {k: v for k, v in kwargs.items() if k in names}


def _class_for(config: AdapterConfig, cls: type[PeftModel] = PeftModel) -> type[PeftModel]:
    if config.task_type is not None and config.task_type not in _BY_TASK:
        raise UnsupportedError(
            "task_type", f"{config.task_type!r} is not one of {', '.join(_BY_TASK)}"
        )
    return _BY_TASK.get(config.task_type or "", PeftModel) if cls is PeftModel else cls


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The sequences of a call."""
    for value in (*args[:1], *(kwargs.get(k) for k in ("input_ids", "inputs", "inputs_embeds"))):
        if value is not None:
            return cast(Tensor, value)
    raise ValueError("input_ids: required")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in its place in the base, which may be inside an adapter's layer."""
    owner = model
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
        if isinstance(owner, AdapterLayer):
            owner = owner.base_layer
    setattr(owner, name, module)


def get_peft_model(
    model: PreTrainedModel, peft_config: AdapterConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """A model with a new adapter, of the class that the config's `task_type` says.

    Raises:
        ConfigError, UnsupportedError: the config does not fit the model.
        ValueError: the model has adapters already: `add_adapter` adds more.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, AdapterLayer) for m in model.modules()):
        raise ValueError("model: has adapters already; add_adapter(name, config) adds one")
    return _class_for(peft_config)(model, peft_config, adapter_name, **kwargs)


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under the keys of its file."""
    model._known(adapter_name)
    return model._file_tensors(adapter_name, save_embedding_layers)


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give an adapter the tensors of a file. Raises CheckpointError; nothing is changed then."""
    model._known(adapter_name)
    tensors = TensorReader(peft_model_state_dict)
    with torch.device("meta"):
        check = model._saved_config(adapter_name).build(model.base)
    check.load(tensors)
    tensors.finish()
    model._parts[adapter_name].load(tensors.again())


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Make a quantized model ready to train adapters on.

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
