"""Does the paged attention serve this model right? Asked of the model itself at start.

No flag of transformers tells: some architectures never call the attention function, or call it with
something missing, and answer nonsense. So a short ragged batch, chunked over scattered blocks, is
compared with the model's own eager attention, and a model that differs is refused.

A window or chunk longer than that batch would not show in it. It is found before, in the masks that
the model asks transformers for: each is held against what its layer tells the attention function,
out to the end of the context. What shows only late, and in no such mask, is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from server.models.attention import NAME
from server.models.context import ChunkRows, ForwardContext, forward_context
from server.models.kv_pool import KVPool

#: The name under which `_Observer` is registered.
_OBSERVED = f"{NAME}_observed"
#: Positions at which masks are looked at, at most: beyond any window or chunk.
_MAX_POSITION = 1 << 18
_LENGTHS = (9, 22, 37)
_BLOCK_SIZE = 4
#: Allowed difference of logits, in standard deviations of the eager ones.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
#: Rotary embeddings that depend on the longest position of the whole batch.
_BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}


class UnservableModel(ValueError):
    """The model cannot be served; the message says why."""


def is_encoder(model: PreTrainedModel) -> bool:
    """Does it compute hidden states and nothing else, each from its whole sequence?"""
    return model.get_output_embeddings() is None


def position_offset(model: PreTrainedModel) -> int:
    """Where the model counts positions from: RoBERTa and its kin begin behind the padding's id."""
    embeddings: Any = getattr(model, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return 0
    return int(embeddings.padding_idx) + 1


def check_config(model: PreTrainedModel) -> None:
    """Refuse what a forward pass would not show.

    Raises:
        UnservableModel: rotary embeddings that make one request's result depend on another's.
    """
    bad = _rope_types(model.config.to_dict()) & _BATCH_DEPENDENT_ROPE
    if bad:
        raise UnservableModel(
            f"{type(model).__name__}: rope type {sorted(bad)[0]!r} depends on the longest sequence "
            "of the batch, so requests would change each other's results"
        )


def _rope_types(config: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                found.add(value)
            found |= _rope_types(value)
    return found


@torch.inference_mode()
def observe(model: PreTrainedModel) -> list[AttentionCall]:
    """What each layer gives the attention function.

    Raises:
        UnservableModel: the model does not take a packed batch; a layer does not call the attention
            function, or more than once, or does not tell it what its mask hides.
    """
    name = type(model).__name__
    observer = _Observer()
    AttentionInterface.register(_OBSERVED, observer.attend)
    AttentionMaskInterface.register(_OBSERVED, observer.mask)
    model.set_attn_implementation(_OBSERVED)
    try:
        _forward(model, torch.zeros(2, dtype=torch.long, device=model.device), torch.arange(2))
    except Exception as exc:
        raise UnservableModel(f"{name}: does not compute a packed batch: {exc}") from exc
    finally:
        model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    calls = sorted(observer.calls, key=lambda call: call.layer)
    if [call.layer for call in calls] != list(range(num_layers)):
        raise UnservableModel(
            f"{name}: of {num_layers} layers, {len({call.layer for call in calls})} call "
            "transformers' attention interface (each should, once): its cache cannot be paged"
        )
    num_positions = min(config.max_position_embeddings, _MAX_POSITION)
    for call in calls:
        if not call.tells_its_mask(num_positions, causal=not is_encoder(model)):
            raise UnservableModel(
                f"{name}: the mask of layer {call.layer} hides something (a window, chunks) that "
                "the layer does not tell its attention function: it would answer wrongly"
            )
    return calls


#: (batch, head, query position, key positions) → which keys the query sees.
_Visible = Callable[[int, int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """What a layer gave the attention function.

    Attributes:
        kv_shape: (num_kv_heads, head_dim, v_head_dim).
        visible: what its mask shows, if it has one.
        has_sinks: was it given attention sinks?
    """

    layer: int
    kv_shape: tuple[int, int, int]
    scaling: float | None
    window: int | None
    softcap: float | None
    visible: _Visible | None
    has_sinks: bool

    def tells_its_mask(self, num_positions: int, *, causal: bool) -> bool:
        """Do causality and the window say all that the mask does, at late positions too?"""
        if not causal and self.window is not None:
            return False  # what it means here is not known
        if self.visible is None:
            return True
        k = torch.arange(num_positions)
        for q in (k[num_positions // 2], k[-1]):
            told = k <= q if causal else torch.ones_like(k, dtype=torch.bool)
            if self.window is not None:
                told &= k > q - self.window
            if not torch.equal(self.visible(0, 0, q, k).expand_as(told), told):
                return False
        return True


class _Observer:
    """An attention function that computes nothing, and masks that are only a number."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.masks: list[_Visible] = []

    def mask(
        self,
        *,
        q_length: int,
        kv_length: int,
        mask_function: _Visible,
        device: torch.device,
        **kwargs: Any,
    ) -> Tensor:
        self.masks.append(mask_function)
        number = float(len(self.masks) - 1)
        return torch.full((1, 1, q_length, kv_length), number, device=device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        shape = (key.shape[1], key.shape[3], value.shape[3])
        visible = None if attention_mask is None else self._visible(attention_mask)
        if not hasattr(module, "layer_idx"):  # of an encoder that has no use for it
            module.layer_idx = len(self.calls)  # type: ignore[assignment]
        layer: int = module.layer_idx  # type: ignore[assignment]
        sinks = s_aux is not None
        self.calls.append(
            AttentionCall(layer, shape, scaling, sliding_window, softcap, visible, sinks)
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    def _visible(self, mask: Tensor) -> _Visible:
        """What a mask shows; of one that the model has changed, nothing is known."""
        numbers = mask.unique().tolist()
        if len(numbers) == 1 and numbers[0] in range(len(self.masks)):
            return self.masks[int(numbers[0])]
        return lambda batch, head, q, k: torch.tensor(False)


def _prompts(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompts = [torch.randint(0, vocab, (n,), generator=generator) for n in _LENGTHS]
    pad = model.config.get_text_config().pad_token_id
    if is_encoder(model) and pad is not None:  # some encoders give padding no position
        prompts = [torch.where(ids == pad, (pad + 1) % vocab, ids) for ids in prompts]
    return prompts


@torch.inference_mode()
def eager_outputs(model: PreTrainedModel) -> list[Tensor]:
    """What `probe` compares with, logits or an encoder's hidden states `[len, dim]` of each prompt:
    by the model's own modules and its own eager attention."""
    model.set_attn_implementation("eager")
    try:
        prompts = [prompt[None].to(model.device) for prompt in _prompts(model)]
        if is_encoder(model):
            return [model(prompt).last_hidden_state[0] for prompt in prompts]
        return [model(prompt, use_cache=False).logits[0] for prompt in prompts]
    finally:
        model.set_attn_implementation(NAME)


@torch.inference_mode()
def probe(
    model: PreTrainedModel, kv_shapes: list[tuple[int, int, int]], expected: list[Tensor]
) -> None:
    """Compare a ragged, chunked, paged batch with `eager_outputs`.

    Raises:
        UnservableModel: the logits differ.
    """
    prompts = _prompts(model)
    actual = _paged_logits(model, kv_shapes, prompts)
    for want, got in zip(expected, actual, strict=True):
        difference = float((want.float() - got.float()).abs().max() / want.float().std())
        if not difference <= _TOLERANCE[want.dtype]:
            raise UnservableModel(
                f"{type(model).__name__}: paged attention differs from eager attention by "
                f"{difference:.2g} standard deviations of the outputs: it would answer wrongly"
            )


def _paged_logits(
    model: PreTrainedModel, kv_shapes: list[tuple[int, int, int]], prompts: list[Tensor]
) -> list[Tensor]:
    """Logits of every position: most of each prompt in a first step, then a chunk, then one row.

    An encoder's hidden states, of all prompts in one step.
    """
    num_blocks = sum(-(-n // _BLOCK_SIZE) for n in _LENGTHS)
    pool = KVPool(
        kv_shapes,
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        dtype=model.dtype,
        device=model.device,
    )
    # Sequences take blocks in turn from the end: scattered and interleaved.
    free = list(range(num_blocks))
    slots, tables = [], []
    for n in _LENGTHS:
        blocks = [free.pop(-1 if i % 2 else 0) for i in range(-(-n // _BLOCK_SIZE))]
        table = torch.tensor(blocks)[:, None] * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE)
        slots.append(table.flatten()[:n])
        tables.append(blocks)
    results: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    steps = [
        [max(1, n // 2) for n in _LENGTHS],
        [n - n // 2 - 1 for n in _LENGTHS],
        [1] * len(prompts),
    ]
    for step in [list(_LENGTHS)] if is_encoder(model) else steps:
        rows, chunks, start = [], [], 0
        for i, n in enumerate(step):
            rows.append(torch.arange(done[i], done[i] + n))
            num_blocks = -(-(done[i] + n) // _BLOCK_SIZE)
            chunks.append(ChunkRows(start, start + n, done[i], tables[i][:num_blocks]))
            start += n
        context = ForwardContext(
            pool=pool,
            slots=torch.cat([s[r] for s, r in zip(slots, rows, strict=True)]).to(model.device),
            chunks=chunks,
            causal=not is_encoder(model),
        )
        tokens = torch.cat([p[r] for p, r in zip(prompts, rows, strict=True)]).to(model.device)
        with forward_context(context):
            logits = _forward(model, tokens, torch.cat(rows))
        for i, part in enumerate(logits.split(step)):
            results[i].append(part)
            done[i] += step[i]
    return [torch.cat(parts) for parts in results]


def _forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits `[rows, vocab]` of a packed batch, or an encoder's hidden states."""
    if is_encoder(model):
        positions = positions[None].to(model.device) + position_offset(model)
        found: Tensor = model(input_ids=tokens[None], position_ids=positions).last_hidden_state[0]
        return found
    output = model(
        input_ids=tokens[None],
        position_ids=positions[None].to(model.device),
        use_cache=False,
        logits_to_keep=torch.arange(len(tokens), device=model.device),
    )
    logits: Tensor = output.logits[0]
    return logits
