"""Faster modules in the place of a model's own, where these compute what is known here.

A module is taken for what its parts and its own answers say, not for its class's name: an attention
with the four projections and rotary embeddings, a gated MLP, an RMSNorm. That the model still
computes the same with them is the start-up probe's to find out; `fuse` can be undone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore.layers import linears
from peftcore.ops.cpu import kernels
from server.models.attention import Scores, attend
from server.models.probe import AttentionCall

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")


class FusedAttention(nn.Module):
    """Projections in one launch; rotation, cache and attention in another."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, base: nn.Module, call: AttentionCall) -> None:
        """`base`: the model's own attention; its parts are shared. `call`: what it asks for."""
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        self.layer_idx = call.layer
        _, self.head_dim, self.v_head_dim = call.kv_shape
        scale = self.head_dim**-0.5 if call.scaling is None else call.scaling
        self.scores = Scores(scale, call.window, call.softcap)
        self.has_head_norms = hasattr(self, "q_norm")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: `[1, rows, hidden]`; cos and sin `[1, rows, dim]`."""
        q, k, v = linears((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        q, k = q.view(*q.shape[1:-1], -1, self.head_dim), k.view(*k.shape[1:-1], -1, self.head_dim)
        v = v.view(*v.shape[1:-1], -1, self.v_head_dim)
        if self.has_head_norms:
            q, k = self.get_submodule("q_norm")(q), self.get_submodule("k_norm")(k)
        out = attend(self.layer_idx, q, k, v, self.scores, position_embeddings)
        return linears((self.o_proj,), out.flatten(2))[0], None


class FusedGatedMLP(nn.Module):
    """gate and up in one launch, the activation and their product in another."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, base: nn.Module, activation: str) -> None:
        """`base`: the model's own MLP; its parts are shared."""
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, rows, hidden]`; returns the same."""
        gate, up = linears((self.gate_proj, self.up_proj), x)
        kernels().gate_(gate, up, self.activation)
        return linears((self.down_proj,), gate)[0]


class FusedRMSNorm(nn.Module):
    """x · (mean(x²) + eps)^(−1/2) ⊙ (offset + weight), in one launch."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset}"

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., dim]` float32; returns the same."""
        normed: Tensor = kernels().rms_norm(x, self.weight.data, self.offset, self.eps)
        return normed


def fuse(model: PreTrainedModel, calls: Mapping[int, AttentionCall]) -> dict[str, nn.Module]:
    """Put faster modules in the place of those that are recognized, in place.

    Args:
        model: float32 on a CPU, its attention function set.
        calls: layer → what its attention asks for.

    Returns:
        path → the module that was there, for `unfuse`.
    """
    replaced: dict[str, nn.Module] = {}
    for path, module in list(model.named_modules()):
        faster = _fused(module, calls)
        if faster is not None:
            replaced[path] = module
            _put(model, path, faster)
    return replaced


def unfuse(model: PreTrainedModel, replaced: Mapping[str, nn.Module]) -> None:
    """Put the model's own modules back, outermost first: children were replaced in both."""
    for path, module in replaced.items():
        _put(model, path, module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _fused(module: nn.Module, calls: Mapping[int, AttentionCall]) -> nn.Module | None:
    children = {name for name, _ in module.named_children()}
    if children.issuperset(_PROJECTIONS):
        call = calls.get(getattr(module, "layer_idx", -1))
        takes = inspect.signature(type(module).forward).parameters
        extra = children - {*_PROJECTIONS, *_HEAD_NORMS, "rotary_emb"}
        norms = children & {*_HEAD_NORMS}
        per_head = (
            all(_is_per_head(module.get_submodule(n), call) for n in norms) if call else False
        )
        if call and per_head and "position_embeddings" in takes and not extra and len(norms) != 1:
            return None if call.has_sinks else FusedAttention(module, call)
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        activation = _activation(module.act_fn)
        if activation is not None:
            return FusedGatedMLP(module, activation)
    if not children:
        return _rms_norm(module)
    return None


def _is_per_head(norm: nn.Module, call: AttentionCall) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == call.kv_shape[1:2]


@torch.no_grad()
def _activation(module: Any) -> str | None:
    """The kernels' name of what the module computes."""
    x = torch.linspace(-8, 8, 257)
    expected = module(x)
    for name in ("silu", "gelu_tanh"):
        y = x.clone()
        kernels().gate_(y, torch.ones_like(x), name)
        if torch.allclose(y, expected, atol=1e-6, rtol=1e-5):
            return name
    return None


@torch.no_grad()
def _rms_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The module as one of the kernels, if it answers as one."""
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = [name for name, _ in module.named_parameters()]
    if own != ["weight"] or weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    if not isinstance(eps, float) or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    expected = module(x)
    for offset in (0.0, 1.0):
        faster = FusedRMSNorm(weight, eps, offset)
        if torch.allclose(faster(x), expected, atol=1e-5, rtol=1e-5):
            return faster
    return None
