"""The probe refuses what the paged attention would serve wrongly, and leaves no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from peftcore.quant import Quantization
from server.models import attention, loader, probe
from server.models.attention import NAME, paged_attention
from server.models.context import current_context
from server.models.loader import prepare_model
from server.models.probe import UnservableModel
from tests.server.models import zoo

CPU = torch.device("cpu")


def prepare(model: PreTrainedModel) -> None:
    prepare_model(model, "none", CPU)


# -- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_an_architecture_is_refused_with_the_reason(name: str) -> None:
    config, reason = zoo.REFUSED[name]
    model = zoo.make(name, config)
    with pytest.raises(UnservableModel, match=reason) as caught:
        prepare(model)
    assert str(caught.value).startswith(type(model).__name__)


@pytest.mark.parametrize("name", ["llama4_text", "qwen2_moe", "phimoe"])
def test_a_window_longer_than_the_context_hides_nothing(name: str) -> None:
    """Then it may be a mask's alone."""
    config, _ = zoo.REFUSED[f"{name}/long"]
    key = "attention_chunk_size" if name == "llama4_text" else "sliding_window"
    prepare(zoo.make(name, config | {key: 256}))


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_encoders(name: str, quantization: Quantization) -> None:
    loaded = prepare_model(zoo.make_encoder(name), quantization, CPU)
    assert loaded.is_encoder
    assert loaded.position_offset == (2 if "roberta" in name else 0)
    assert loaded.max_position_embeddings == 128 - loaded.position_offset


@pytest.mark.parametrize("name", zoo.REFUSED_ENCODERS)
def test_other_encoders_are_refused(name: str) -> None:
    config, reason = zoo.REFUSED_ENCODERS[name]
    with pytest.raises(UnservableModel, match=reason):
        prepare(zoo.make_encoder(name, config))


def test_an_encoder_whose_positions_begin_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "position_offset", lambda model: 0)
    with pytest.raises(UnservableModel, match="differs from eager attention"):
        prepare(zoo.make_encoder("roberta"))


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        (
            "phi3",
            {
                "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
        ),
        (
            "gemma3_text",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            },
        ),
    ],
)  # fmt: skip
def test_rotation_that_depends_on_the_batch_is_refused(name: str, rope: dict[str, Any]) -> None:
    if name != "gemma3_text":
        rope = {"rope_theta": 10000.0} | rope
    with pytest.raises(UnservableModel, match=r"rope type '(dynamic|longrope)'.*each other"):
        prepare(zoo.make(name, rope_parameters=rope))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotation_that_does_not_is_served(rope: dict[str, Any]) -> None:
    prepare(zoo.make("llama", rope_parameters={"rope_theta": 10000.0} | rope))


def test_a_model_that_takes_no_packed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama")
    forward = model.forward

    def older(input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", older)
    with pytest.raises(
        UnservableModel, match=r"LlamaForCausalLM: does not compute.*logits_to_keep"
    ):
        prepare(model)


# -- a wrong attention ---------------------------------------------------------------------------


def wrong(**changes: Any) -> Any:
    """The paged attention, called with something else than what the layer says."""

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        for key, change in changes.items():
            kwargs[key] = change(kwargs.get(key))
        return paged_attention(*args, **kwargs)

    return attend


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own modules, and attention by torch."""
    monkeypatch.setattr(loader, "select", lambda device: None)
    monkeypatch.setattr(attention, "select", lambda device: None)


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(
    ("name", "attend"),
    [
        ("mistral", wrong(sliding_window=lambda window: None)),
        ("mistral", wrong(sliding_window=lambda window: window + 1)),
        ("gemma3_text", wrong(sliding_window=lambda window: window and window - 1)),
        ("llama", wrong(scaling=lambda scale: scale * 1.05)),
        ("granite", wrong(scaling=lambda scale: None)),
        ("gemma2", wrong(softcap=lambda cap: None)),
        ("gpt_oss", wrong(s_aux=lambda sinks: None)),
        ("gpt_oss", wrong(s_aux=lambda sinks: sinks.flip(0))),
    ],
)
def test_a_wrong_attention_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, attend: Any
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attend)
    with pytest.raises(UnservableModel, match=r"differs from eager attention by \d"):
        prepare(zoo.make(name))


@pytest.mark.usefixtures("by_torch")
def test_wrong_pages_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step alone would be right: what is wrong is what it finds of the steps before."""
    from server.models.kv_pool import KVPool

    write = KVPool.write

    def shifted(self: KVPool, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        write(self, layer, slots if len(slots) > 3 else slots ^ 1, keys, values)

    monkeypatch.setattr(KVPool, "write", shifted)
    with pytest.raises(UnservableModel, match="differs"):
        prepare(zoo.make("llama"))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("kind", [attention._PromptRows, attention._DecodeRows])
def test_a_mask_that_shows_too_much_is_caught(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    original = attention._mask

    def mask(context: Any, group: Any, window: int | None) -> Tensor:
        found = original(context, group, window)
        return torch.ones_like(found) if isinstance(group, kind) else found

    monkeypatch.setattr(attention, "_mask", mask)
    with pytest.raises(UnservableModel, match="differs"):
        prepare(zoo.make("mistral"))  # its window hides something from decodes too


@pytest.mark.usefixtures("by_torch")
def test_heads_in_the_wrong_groups_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention.Tensor, "repeat_interleave",
        lambda tensor, num, dim: tensor.repeat(num, 1, 1),
    )  # fmt: skip
    with pytest.raises(UnservableModel, match="differs"):
        prepare(zoo.make("llama"))


def test_a_model_of_nan_is_refused() -> None:
    model = zoo.make("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UnservableModel, match="nan"):
        prepare(model)


# -- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "gemma3_text"])
def test_nothing_of_the_model_changes(name: str) -> None:
    model = zoo.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_attn_implementation(NAME)
    shapes = [call.kv_shape for call in probe.observe(model)]
    assert model.config._attn_implementation == NAME
    probe.probe(model, shapes, probe.eager_outputs(model))
    assert model.config._attn_implementation == NAME
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="outside of forward_context"):
        current_context()


def test_a_prepared_model_asks_for_no_gradients() -> None:
    model = zoo.make("llama").train()
    loaded = prepare_model(model, "none", CPU)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("where", ["measure", "eager", "paged"])
def test_a_failure_leaves_the_implementation_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = zoo.make("llama")
    model.set_attn_implementation(NAME)
    shapes = [call.kv_shape for call in probe.observe(model)]
    expected = probe.eager_outputs(model)
    forward = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        now = {NAME: "paged", "eager": "eager"}.get(model.config._attn_implementation, "measure")
        if now == where:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    steps = {
        "measure": probe.observe,
        "eager": probe.eager_outputs,
        "paged": partial(probe.probe, kv_shapes=shapes, expected=expected),
    }
    with pytest.raises((RuntimeError, UnservableModel), match="out of memory"):
        steps[where](model)
    assert model.config._attn_implementation == NAME
    with pytest.raises(RuntimeError, match="outside of forward_context"):
        current_context()


def test_shapes_are_those_that_reach_the_attention() -> None:
    """Keys and values of unlike widths; few key-value heads; a head size of its own."""
    for name, shape in (("deepseek_v3", (4, 12, 6)), ("llama", (2, 8, 8)), ("qwen3", (2, 16, 16))):
        model = zoo.make(name)
        model.set_attn_implementation(NAME)
        assert [call.kv_shape for call in probe.observe(model)] == [shape] * 2
