"""AdapterHub's heads, as modules of transformers' own class for the task.

    head_config.json       {config, label2id, model_class, model_type, name, …}
    model_head.safetensors its tensors

A class of transformers' saves its head as it is: `config` is null, and keys are the modules' paths.
AdapterHub's own classes (`BertAdapterModel`, …) save `heads.<name>.<i>.weight`: linear layers with
an activation between. Those are read where transformers' class computes the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.branches import backbone_of
from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import CheckpointError, ConfigError, UnsupportedError

HEAD_CONFIG_NAME = "head_config.json"
HEAD_NAME = "model_head.safetensors"
PICKLED_HEAD_NAME = "pytorch_model_head.bin"


@dataclass(frozen=True)
class Head:
    """A head in transformers' form.

    Attributes:
        tensors: by their names in the class, `classifier.weight`.
        task: what the head is for; None: the model's class says it.
        id2label, problem_type: as in a model's config.json; None where the files do not say.
    """

    tensors: Mapping[str, Tensor]
    task: str | None = None
    id2label: Mapping[str, str] | None = None
    problem_type: str | None = None

    def modules(self, model_type: str | None) -> list[str]:
        """What `modules_to_save` says of it: a whole head by its first name, one of the backbone's
        modules by its path."""
        backbone = backbone_of(model_type or "")
        return sorted(
            {
                key.rpartition(".")[0] if key.startswith(f"{backbone}.") else key.partition(".")[0]
                for key in self.tensors
            }
        )


class _Form(NamedTuple):
    """A flexible head that is one of transformers': where its linear layers are there."""

    layers: tuple[str, ...]
    activation: str | None = None
    use_pooler: bool = False


_ROBERTA = [_Form(("classifier.dense", "classifier.out_proj"), "tanh")]
_TEXT: dict[str, list[_Form]] = {
    "bert": [
        _Form(("bert.pooler.dense", "classifier"), "tanh"),  # a pooler of its own
        _Form(("classifier",), use_pooler=True),
    ],
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": [_Form(("classifier.dense", "classifier.out_proj"), "gelu")],
}
_TOKENS = {model_type: [_Form(("classifier",))] for model_type in _TEXT}

#: `head_type` → the task, its forms by model type, and the problem type that it stands for.
_TYPES: dict[str, tuple[str, dict[str, list[_Form]], str | None]] = {
    "classification": ("SEQ_CLS", _TEXT, None),
    "multilabel_classification": ("SEQ_CLS", _TEXT, "multi_label_classification"),
    "tagging": ("TOKEN_CLS", _TOKENS, None),
}


def read_head(tensors: TensorReader, about: bytes | None, model_type: str | None) -> Head:
    """A head of AdapterHub's two files.

    Args:
        about: `head_config.json`'s bytes, where there is one.

    Raises:
        ConfigError: `about` is no JSON object of the known form.
        CheckpointError: the tensors are not those that it implies.
        UnsupportedError: a head that no class of transformers' has.
    """
    raw = _parsed(about)
    given = {key: tensors.peek(key) for key in tensors.keys()}  # noqa: SIM118  (not a mapping)
    config = raw.get("config")
    if config is None:
        flexible = next((key for key in given if key.startswith("heads.")), None)
        if flexible is not None:
            raise ConfigError(
                HEAD_CONFIG_NAME, f"required beside {flexible}: it says what the layers are for"
            )
        return Head(given, id2label=_labels(raw.get("label2id")))
    if not isinstance(config, dict):
        raise ConfigError(HEAD_CONFIG_NAME, "config: an object is expected")
    return _from_flexible(config, str(raw.get("name")), given, model_type)


def _parsed(about: bytes | None) -> dict[str, Any]:
    try:
        raw = {} if about is None else json.loads(about)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(HEAD_CONFIG_NAME, f"not valid JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise ConfigError(HEAD_CONFIG_NAME, "a JSON object is expected")
    return raw


def _from_flexible(
    config: Mapping[str, Any], name: str, given: dict[str, Tensor], model_type: str | None
) -> Head:
    head_type = config.get("head_type")
    if head_type not in _TYPES:
        raise UnsupportedError(
            HEAD_CONFIG_NAME,
            f"head_type: {head_type!r} is not one of {', '.join(_TYPES)}; without the head's files "
            "the adapter embeds",
        )
    task, by_model, problem_type = _TYPES[head_type]
    forms = by_model.get(model_type or "", [])
    form = next((form for form in forms if _is(config, form)), None)
    if form is None:
        of_models = " or ".join(map(_described, forms)) or "none"
        raise UnsupportedError(
            HEAD_CONFIG_NAME,
            f"transformers' {model_type} has no {task} head of this form: of it {of_models} are "
            "served; without the head's files the adapter embeds",
        )
    found = {}
    for position, path in enumerate(form.layers):
        key = f"heads.{name}.{1 + 3 * position}"  # dropout, linear, activation
        if f"{key}.weight" not in given:
            raise CheckpointError(f"{key}.weight", f"missing: {HEAD_CONFIG_NAME} implies it")
        weight = found[f"{path}.weight"] = given.pop(f"{key}.weight")
        bias = given.pop(f"{key}.bias", None)
        found[f"{path}.bias"] = torch.zeros(len(weight)) if bias is None else bias
    if given:
        raise CheckpointError(min(given), f"{HEAD_CONFIG_NAME} implies no such tensor")
    if head_type == "classification" and config.get("num_labels") == 1:
        problem_type = "regression"  # it is trained by the squared error
    return Head(found, task, _labels(config.get("label2id")), problem_type)


def _is(config: Mapping[str, Any], form: _Form) -> bool:
    if config.get("layers") != len(form.layers):
        return False
    if bool(config.get("use_pooler", False)) != form.use_pooler:
        return False
    return len(form.layers) == 1 or config.get("activation_function") == form.activation


def _described(form: _Form) -> str:
    activation = f", activation_function={form.activation!r}" if form.activation else ""
    return f"layers={len(form.layers)}{activation}, use_pooler={form.use_pooler}"


def _labels(label2id: object) -> dict[str, str] | None:
    """AdapterHub says which number a label has, not which label a number."""
    if label2id is None:
        return None
    if not isinstance(label2id, dict):
        raise ConfigError(HEAD_CONFIG_NAME, "label2id: an object is expected")
    return {str(number): label for label, number in label2id.items()}


__all__ = ["HEAD_CONFIG_NAME", "HEAD_NAME", "PICKLED_HEAD_NAME", "Head", "read_head"]
