"""A base model with a set of adapters: adding, switching, merging and removing them.

Knows which parts of which adapter are where, and which act; nothing of files, tasks or calls. What
users see of it is `model.PeftModel`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore import merge, mixing
from peftcore.base import BaseModel, BaseModule
from peftcore.checkpoint.reader import TensorReader
from peftcore.config import HEAD_NAMES, AdapterConfig
from peftcore.methods.adalora import RankAllocator
from peftcore.parts import Parts, Prompt
from peftcore.quant import keep_exact
from peftcore.tuner import AdapterContext, AdapterLayer, Owner

#: The name that means "no adapter" in `adapter_names`.
BASE_NAME = "__base__"

NO_CHECKPOINTING = (
    "PREFIX_TUNING does not work with gradient checkpointing: the recomputation would find the "
    "cache changed. Turn gradient_checkpointing off, or train another method"
)

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


class AdapterSet(nn.Module):
    """Any number of adapters of any methods on one frozen base.

    Attributes:
        base_model: the wrapped base; `base_model.model` is the transformers model itself.
        base: the base as it was before any adapter.
        peft_config: adapter name → its config, complete: with what PEFT fills in from the base.
        prompt_encoder: adapter name → its prompt, for the methods that have one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap `model`, whose own weights are frozen, with no adapter yet.

        Raises ValueError: the model has adapters already.
        """
        if isinstance(model, AdapterSet) or any(
            isinstance(m, AdapterLayer) for m in model.modules()
        ):
            raise ValueError(
                "model: has adapters already; add_adapter(name, config) or load_adapter(folder, "
                "name) adds one to them, and unload() gives the base back"
            )
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

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model, with the adapters' layers in it."""
        return self.base_model.model

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

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
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, initialized as PEFT does; it becomes active by `set_adapter`.

        Args:
            low_cpu_mem_usage, autocast_adapter_dtype: accepted for PEFT's sake.

        Raises:
            ValueError: the name is taken or cannot be one.
            ConfigError, UnsupportedError: the config does not fit the model.
        """
        self._add(adapter_name, peft_config, None)

    def _add(self, name: str, config: AdapterConfig, fill: Callable[[Parts], None] | None) -> None:
        """Add an adapter, new or filled by `fill`; nothing is left of it where that fails."""
        if not isinstance(config, AdapterConfig):
            raise TypeError(
                f"peft_config: a config of peftcore is expected, not {type(config).__module__}'s "
                f"{type(config).__name__}: import it from peftcore, or take get_peft_config({{…}})"
            )
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
            raise ValueError(NO_CHECKPOINTING)
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
            config.base_model_name_or_path = self.base_model.model.config.name_or_path or None
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

    def disable_adapter_layers(self) -> None:
        """The model is the base alone, until `enable_adapter_layers`."""
        self._context.enabled = False

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._context.enabled = True

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

    # -- who acts on what ------------------------------------------------------------------------

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


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in its place in the base, which may be inside an adapter's layer."""
    owner = model
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
        if isinstance(owner, AdapterLayer):
            owner = owner.base_layer
    setattr(owner, name, module)
