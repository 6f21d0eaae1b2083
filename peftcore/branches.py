"""The residual branches of a transformer's layers: where bottlenecks act.

A layer adds two branches to the residual stream r, attention's and the feed-forward block's:

    pre-norm    r ← r + h(norm(r))          llama, gpt2 and their like
    post-norm   r ← norm(h(r) + r)          bert and its like

Knows model types and paths; nothing of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from peftcore.errors import UnsupportedError

if TYPE_CHECKING:
    from peftcore.base import BaseModel


class _Site(NamedTuple):
    """Paths within a layer: what `Branch` says of them, and AdapterHub's name of the place."""

    path: str
    stream: str | None
    hub: str


class _Family(NamedTuple):
    backbone: str
    layers: str
    attention: _Site
    feed_forward: _Site


def _llama() -> _Family:
    return _Family(
        "model",
        "layers",
        _Site("self_attn.o_proj", "input_layernorm", "attention_adapters"),
        _Site("mlp.down_proj", "post_attention_layernorm", "output_adapters"),
    )


def _bert(backbone: str) -> _Family:
    return _Family(
        backbone,
        "encoder.layer",
        _Site("attention.output", None, "attention.output"),
        _Site("output", None, "output"),
    )


_FAMILIES: dict[str, _Family] = {
    **{name: _llama() for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")},
    "gpt2": _Family(
        "transformer",
        "h",
        _Site("attn.resid_dropout", "ln_1", "attention_adapters"),
        _Site("mlp.dropout", "ln_2", "output_adapters"),
    ),
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "xlm-roberta": _bert("roberta"),
    "electra": _bert("electra"),
}


@dataclass(frozen=True)
class Branch:
    """One branch of one layer.

    Attributes:
        path: the module whose output is h; under post-norm the one that is given h before its own
            linear map, and r, and adds and norms.
        stream: path of the norm whose input is r; None under post-norm.
        hub: what AdapterHub calls the place in its files.
        backbone: the first part of `path` and `hub` in a model that has a head around its backbone,
            with a dot. Files name it or not, after the model that they were saved from.
    """

    layer: int
    kind: Literal["attention", "feed_forward"]
    path: str
    stream: str | None
    hub: str
    backbone: str


def known_model_types() -> list[str]:
    """The model types whose branches are known, sorted."""
    return sorted(_FAMILIES)


def backbone_of(model_type: str) -> str | None:
    """What the backbone is called in a model with a head around it; None for an unknown type."""
    family = _FAMILIES.get(model_type)
    return None if family is None else family.backbone


def branches_of(base: BaseModel) -> list[Branch]:
    """Every layer's branches in order, attention before feed-forward.

    Raises:
        UnsupportedError: a model type that is not known here.
    """
    family = _FAMILIES.get(base.model_type)
    if family is None:
        raise UnsupportedError(
            "model_type",
            f"where a bottleneck acts in {base.model_type!r} is not known here: only in "
            + ", ".join(known_model_types()),
        )
    backbone = f"{family.backbone}."
    wrapped = f"{backbone}{family.layers}.0.{family.feed_forward.path}" in base.modules
    root = (backbone if wrapped else "") + family.layers
    found: list[Branch] = []
    while True:
        i = len(found) // 2
        layer = f"{root}.{i}"
        if f"{layer}.{family.feed_forward.path}" not in base.modules:
            return found
        found += [
            _branch(i, "attention", layer, family.attention, backbone),
            _branch(i, "feed_forward", layer, family.feed_forward, backbone),
        ]


def _branch(
    i: int, kind: Literal["attention", "feed_forward"], layer: str, site: _Site, backbone: str
) -> Branch:
    stream = None if site.stream is None else f"{layer}.{site.stream}"
    return Branch(i, kind, f"{layer}.{site.path}", stream, f"{layer}.{site.hub}", backbone)
