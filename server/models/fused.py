"""Faster modules in the place of a model's own, where these compute what is known here.

A module is taken for what its parts and its own answers say, not for its class's name: an attention
with the four projections and rotary embeddings, a gated MLP, an RMSNorm, a layer of these. That the
model still computes the same with them is the start-up probe's to find out; `fuse` can be undone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcore.layers import AdapterHost, AdapterLinear, AdapterModule, linears
from peftcore.ops.cpu import kernels
from peftcore.quant import QuantLinear
from server.models.attention import Scores, attend, plan_of
from server.models.context import current_context
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

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

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

    def projections(self) -> tuple[nn.Module, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

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


class FusedLayer(nn.Module):
    """A decoder layer in one launch; part by part in a step whose adapters do what kernels do not
    know, and over a base that is not quantized."""

    self_attn: FusedAttention
    mlp: FusedGatedMLP
    input_layernorm: nn.Module

    def __init__(self, base: nn.Module) -> None:
        """`base`: the model's own layer; its parts are shared."""
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        self.branch_norms = _BRANCH_NORMS[frozenset(name for name, _ in base.named_children())]
        self._bound: tuple[Any, AdapterHost, int] | None = None

    def bind(self, host: AdapterHost) -> None:
        """The parts are as they will stay, wrapped and rounded: no step looks for them again."""
        self._bound = self._launch(), host, self.self_attn.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: `[1, rows, hidden]`; cos and sin `[1, rows, dim]`. Returns as
        hidden_states."""
        context, batch = current_context(), None
        if self._bound is not None:
            launch, host, index = self._bound
            batch = host.kernel_tokens
            if host.touched:
                launch = None
        else:
            launch, index = self._launch(), self.self_attn.layer_idx
        if launch is None or not context.causal:
            return self.by_parts(hidden_states, position_embeddings)
        cos, sin = position_embeddings
        keys, values = context.pool.keys[index], context.pool.values[index]
        result: Tensor = launch(hidden_states, cos, sin, keys, values, plan_of(context), batch)
        return result

    def by_parts(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """As `forward`, in a launch for each part."""
        attended, _ = self.self_attn(self.input_layernorm(x), position_embeddings)
        after_attention, before_mlp, after_mlp = self.branch_norms
        x = x + self._normed(attended, after_attention)
        result: Tensor = x + self._normed(self.mlp(self._normed(x, before_mlp)), after_mlp)
        return result

    def _normed(self, x: Tensor, name: str | None) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    def _launch(self) -> Any:
        """The kernels' layer of these parts; None where not all weights are packed codes."""
        attention, mlp = self.self_attn, self.mlp
        modules = [*attention.projections(), *mlp.projections()]
        bases = [m.base if isinstance(m, AdapterLinear) else m for m in modules]
        if not all(isinstance(base, QuantLinear) and base.packed for base in bases):
            return None
        ids = [m.id if isinstance(m, AdapterLinear) else -1 for m in modules]
        of_heads = _HEAD_NORMS if attention.has_head_norms else (None, None)
        after_attention, before_mlp, after_mlp = (_norm(self, name) for name in self.branch_norms)
        return kernels().Layer(
            [(base.kernel, id_) for base, id_ in zip(bases, ids, strict=True)],
            [
                _norm(self, "input_layernorm"),
                *(_norm(attention, name) for name in of_heads),
                after_attention,
                before_mlp,
                after_mlp,
            ],
            attention.head_dim,
            attention.v_head_dim,
            attention.scores.scale,
            attention.scores.window,
            attention.scores.softcap,
            mlp.activation,
        )


#: A layer's parts → which norms stand behind its attention, before its MLP and behind that.
_BRANCH_NORMS = {
    frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}): (
        None, "post_attention_layernorm", None,
    ),
    frozenset({
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    }): ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}  # fmt: skip


def _norm(owner: nn.Module, name: str | None) -> tuple[Tensor, float, float] | None:
    """A norm as the kernels' layer is given it."""
    if name is None:
        return None
    module: Any = owner.get_submodule(name)
    norm: Any = module.base if isinstance(module, AdapterModule) else module
    return norm.weight.data, norm.offset, norm.eps


def fuse(model: PreTrainedModel, calls: Mapping[int, AttentionCall]) -> dict[str, nn.Module]:
    """Put faster modules in the place of those that are recognized, in place.

    Args:
        model: float32 on a CPU, its attention function set.
        calls: layer → what its attention asks for.

    Returns:
        path → the module that was there, for `unfuse`.
    """
    replaced: dict[str, nn.Module] = {}
    for find in (lambda module: _fused(module, calls), _fused_layer):  # layers of what is fused
        for path, module in list(model.named_modules()):
            faster = find(module)
            if faster is not None:
                replaced[path] = module
                _put(model, path, faster)
    return replaced


def bind(model: PreTrainedModel, host: AdapterHost) -> None:
    """Let layers keep what they launch; once adapters are attached and activations rounded."""
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.bind(host)


def unfuse(model: PreTrainedModel, replaced: Mapping[str, nn.Module]) -> None:
    """Put the model's own modules back, outermost first: children were replaced in both."""
    for path in sorted(replaced, key=lambda path: path.count(".")):
        _put(model, path, replaced[path])


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


def _fused_layer(module: nn.Module) -> FusedLayer | None:
    """A layer of fused parts, if it adds up as the kernels' own does: asked of itself, with other
    modules in its branches' place."""
    children = dict(module.named_children())
    if frozenset(children) not in _BRANCH_NORMS or isinstance(module, FusedLayer):
        return None
    attention, mlp = children.pop("self_attn"), children.pop("mlp")
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedGatedMLP):
        return None
    norms = [norm for norm in children.values() if isinstance(norm, FusedRMSNorm)]
    if len(norms) < len(children):
        return None
    asked = copy.copy(module)
    asked.__dict__["_modules"] = {**module._modules, "self_attn": _Attended(), "mlp": _Mapped()}
    x = torch.randn(1, 3, len(norms[0].weight))
    answer = asked(x, position_embeddings=(x, x))
    expected = FusedLayer(asked).by_parts(x, (x, x))
    if not isinstance(answer, Tensor) or not torch.allclose(answer, expected, atol=1e-5, rtol=1e-5):
        return None
    return FusedLayer(module)


class _Attended(nn.Module):
    """In an attention's place."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return 0.5 + hidden_states.roll(1, -1), None


class _Mapped(nn.Module):
    """In an MLP's place."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.25 - x.roll(2, -1)


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
