"""The classes that transformers has for tasks, around one backbone that is resident.

An adapter that classifies was trained inside such a class: its paths are that class's, and the
head is its own. A `TaskClass` is the class without weights. It says what adapters of the task see
(the resident modules under the class's paths, and the head's), and computes logits from what the
backbone has computed, by transformers' own code. Knows models and paths; nothing of requests.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from peftcore.base import BaseModel
from peftcore.checkpoint.reader import PREFIX, TensorReader
from peftcore.config import AdapterConfig
from peftcore.errors import CheckpointError, ConfigError, UnsupportedError
from peftcore.parts import SHARED_PREFIX
from peftcore.primitives import Bottleneck, ModuleOverride, PrefixKV, Primitive, VirtualTokens
from peftcore.program import AdapterProgram, compile_adapter

#: Tasks with a head of the adapter's own.
CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")

_CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}

#: So many labels that no other size of a model is likely to be it: the layer that makes them shows.
_MANY_LABELS = 7919
#: Most labels of a head; a bound on what an upload can ask for.
MAX_LABELS = 1 << 16


class _Backbone(nn.Module):
    """Stands in the backbone's place and gives what was computed before."""

    outputs: BaseModelOutputWithPoolingAndCrossAttentions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


class TaskClass:
    """One task's class around the backbone of `base`.

    Attributes:
        reads_pooler: does its head read the backbone's pooled output, not a row of the hidden
            states?
    """

    def __init__(self, task: str, model: PreTrainedModel, base: BaseModel) -> None:
        """
        Args:
            model: the resident one, which `base` describes.

        Raises:
            UnsupportedError: transformers has no class for the task, or none of a known form.
        """
        self.task = task
        self.base = base
        self._config = copy.deepcopy(model.config)
        if self._config.get_text_config().pad_token_id is None:
            self._config.get_text_config().pad_token_id = 0  # no batch here is padded
        self._resident_prefix = _prefix(model)
        self._model = self._made(_MANY_LABELS)
        self._prefix = _prefix(self._model)
        backbone = self._model.base_model
        self.reads_pooler = getattr(backbone, "pooler", None) is not None
        self.view = lru_cache(maxsize=8)(self._view)
        if task in CLASSIFICATION:
            self._stub = _Backbone()
            setattr(self._model, self._prefix.rstrip("."), self._stub)
            self._model.eval()
            self._check()

    def _made(self, num_labels: int) -> PreTrainedModel:
        config = copy.deepcopy(self._config)
        config.num_labels = num_labels
        try:
            with torch.device("meta"):
                made: PreTrainedModel = _CLASSES[self.task].from_config(
                    config, attn_implementation="eager"
                )
        except (ValueError, KeyError) as exc:
            raise UnsupportedError(
                "task_type",
                f"{self.task}: transformers has no class for it around {config.model_type}: {exc}",
            ) from None
        return made

    @cached_property
    def head_paths(self) -> list[str]:
        """The head's modules that have parameters of their own."""
        return [
            path
            for path, module in self._model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]

    @cached_property
    def output_path(self) -> str:
        """The head's layer that makes a logit for each label.

        Raises UnsupportedError where that is not one linear layer.
        """
        found = [
            path
            for path in self.head_paths
            if getattr(self._model.get_submodule(path), "out_features", None) == _MANY_LABELS
        ]
        if len(found) != 1:
            raise UnsupportedError(
                "task_type",
                f"{self.task}: the head of {type(self._model).__name__} does not end with one "
                "linear layer",
            )
        return found[0]

    def _view(self, num_labels: int) -> BaseModel:
        """The base as adapters of the task with so many labels see it."""
        made = BaseModel.from_model(self._made(num_labels), self.base.kv_shapes)
        modules = {}
        for path, module in made.modules.items():
            is_leaf = next(module.module.children(), None) is None
            if not (is_leaf and path.startswith(self._prefix)):
                modules[path] = module  # of the resident's others, the children may be wrapped
                continue
            resident = self.base.modules.get(self.resident_path(path))
            if resident is not None:  # the resident model has its own form of some
                modules[path] = dataclasses.replace(
                    resident, path=path, is_output=False, is_head=module.is_head
                )
        return dataclasses.replace(made, modules=modules)

    def resident_path(self, path: str) -> str:
        """The path in the resident model of what the class has at `path`; a head's stays."""
        if path.startswith(self._prefix):
            return self._resident_prefix + path.removeprefix(self._prefix)
        return path

    def num_labels(self, tensors: TensorReader) -> int:
        """How many labels the head in the file has. Raises CheckpointError where there is none."""
        keys = [f"{p}{self.output_path}.weight" for p in (PREFIX, SHARED_PREFIX)]
        key = next((key for key in keys if tensors.has(key)), None)
        if key is None:
            raise CheckpointError(
                keys[0], f"missing: a {self.task} adapter brings the head that it was trained with"
            )
        count = tensors.peek(key).shape[0] if tensors.peek(key).dim() == 2 else 0
        if not 0 < count <= MAX_LABELS:
            raise CheckpointError(key, f"{count} labels: between 1 and {MAX_LABELS} are served")
        return count

    def check_head(self, primitives: Sequence[Primitive], missing: Collection[str]) -> None:
        """Refuse an adapter whose head is not whole, or that would use weights nobody trained.

        Args:
            primitives: of the adapter, under the class's paths.
            missing: resident paths of modules that the base's files hold no weights of.

        Raises:
            ConfigError: names the module.
        """
        whole = {p.module for p in primitives if isinstance(p, ModuleOverride)}
        for path in self.head_paths:
            if path not in whole:
                raise ConfigError(
                    "modules_to_save",
                    f"the head's {path} is not in the adapter: a {self.task} adapter of this base "
                    f"needs {', '.join(self.head_paths)} among its modules_to_save",
                )
        used = {self.resident_path(p) for p in whole}
        for path in sorted({*missing} - used) if self.reads_pooler else ():
            raise ConfigError(
                "modules_to_save",
                f"the base's files hold no weights of its {path}, which the head reads: train it "
                "with the adapter (name it in modules_to_save)",
            )
        for p in primitives:
            path = getattr(p, "module", "")
            if not isinstance(p, ModuleOverride) and path in self.head_paths:
                raise UnsupportedError(
                    "target_modules", f"{path} is of the head, which is only served trained whole"
                )

    def to_resident(self, primitive: Primitive) -> Primitive:
        """The primitive under the resident model's paths."""
        if isinstance(primitive, PrefixKV | VirtualTokens):
            return primitive
        changes: dict[str, Any] = {"module": self.resident_path(primitive.module)}
        if isinstance(primitive, Bottleneck) and primitive.stream is not None:
            changes["stream"] = self.resident_path(primitive.stream)
        return dataclasses.replace(primitive, **changes)

    def logits(
        self, head: Mapping[str, Tensor], hidden: Tensor, pooled: Tensor | None = None
    ) -> Tensor:
        """The class's logits.

        Args:
            head: the head's parameters by their names in the class.
            hidden: `[n, len, hidden]`: the backbone's result, as far as the head reads it.
            pooled: `[n, hidden]`, where `reads_pooler`.

        Returns:
            SEQ_CLS `[n, labels]`, TOKEN_CLS `[n, len, labels]`.
        """
        self._stub.outputs = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=pooled,
        )
        pad = self._config.get_text_config().pad_token_id
        ids = torch.full(hidden.shape[:2], int(pad == 0), device=hidden.device)  # no padding
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits: Tensor = functional_call(self._model, dict(head), kwargs=given).logits
        return logits

    @torch.inference_mode()
    def _check(self) -> None:
        """Does the head read what `logits` is given, and no more? Asked of the class.

        Raises UnsupportedError where it reads something else.
        """
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 7, self.base.hidden_size, generator=g)
        pooled = torch.randn(1, self.base.hidden_size, generator=g) if self.reads_pooler else None
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        few = {name: (3, *s[1:]) if s[0] == _MANY_LABELS else s for name, s in shapes.items()}
        head = {name: torch.randn(shape, generator=g) for name, shape in few.items()}
        given = hidden[:, [self.row]] if self.task == "SEQ_CLS" else hidden
        try:
            expected, actual = self.logits(head, hidden, pooled), self.logits(head, given, pooled)
            shape = (1, 3) if self.task == "SEQ_CLS" else (1, 7, 3)
            if actual.shape != shape or not torch.allclose(expected, actual, atol=1e-3):
                raise ValueError("it reads other rows than the first (of a decoder, the last)")
        except Exception as exc:  # whatever an unknown class makes of the stand-in
            raise UnsupportedError(
                "task_type",
                f"{self.task}: the head of {type(self._model).__name__} is not served: {exc}",
            ) from None

    @property
    def row(self) -> int:
        """Which row of a sequence a SEQ_CLS head reads: the first, or of a decoder the last."""
        return -1 if self._resident_prefix else 0


def _prefix(model: PreTrainedModel) -> str:
    """What stands before the backbone's paths in a model: nothing in one without a head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


class Tasks:
    """What adapters of every task are compiled against, around one resident model.

    Args:
        model: the resident one, as it was before any module was wrapped.
        missing: paths of its modules that its files hold no weights of.

    Attributes:
        generates: has the model an output embedding?
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: BaseModel,
        *,
        missing: Collection[str] = (),
    ) -> None:
        self.base = base
        self.generates = model.get_output_embeddings() is not None
        self._model = model
        self._missing = missing
        self._made: dict[str, TaskClass] = {}

    def task_class(self, task: str) -> TaskClass:
        """Raises UnsupportedError where adapters of the task are not served."""
        made = self._made.get(task)
        if made is None:
            if task not in _CLASSES:
                served = [*(["CAUSAL_LM"] if self.generates else []), *_CLASSES]
                raise UnsupportedError(
                    "task_type", f"{task} is not served on this base: {', '.join(served)} are"
                )
            made = self._made[task] = TaskClass(task, self._model, self.base)
        return made

    def task_of(self, config: AdapterConfig) -> str | None:
        """The task that an adapter is served for; None for one that generates."""
        if config.task_type is None and not self.generates:
            return "FEATURE_EXTRACTION"
        generates = self.generates and config.task_type in (None, "CAUSAL_LM")
        return None if generates else config.task_type

    def compile(
        self,
        config: AdapterConfig,
        tensors: TensorReader,
        *,
        digest: str | None = None,
        check_values: bool = True,
    ) -> AdapterProgram:
        """As `compile_adapter`, for an adapter of any task that is served.

        Raises as `compile_adapter`, and UnsupportedError for another task.
        """
        task = self.task_of(config)
        if task is None:
            return compile_adapter(
                config, tensors, self.base, digest=digest, check_values=check_values
            )
        cls = self.task_class(task)
        num_labels = cls.num_labels(tensors) if task in CLASSIFICATION else 0
        program = compile_adapter(
            config,
            tensors,
            cls.view(num_labels or 1),
            digest=digest,
            check_values=check_values,
            task=task,
        )
        if task in CLASSIFICATION:
            cls.check_head(program.primitives, self._missing)
        return dataclasses.replace(
            program,
            primitives=[cls.to_resident(p) for p in program.primitives],
            num_labels=num_labels,
        )


__all__ = ["CLASSIFICATION", "MAX_LABELS", "TaskClass", "Tasks"]
