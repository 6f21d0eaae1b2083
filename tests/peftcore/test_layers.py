"""Adapters on a model: the model's own logits without one, with one its formula's and PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcore.base import BaseModel
from peftcore.layers import (
    AdapterBatch,
    AdapterEmbedding,
    AdapterHost,
    AdapterModule,
    Segment,
    VirtualRows,
    attach,
)
from peftcore.packing import BoundAdapter, ModuleWeights, bind, pack
from peftcore.quant import QuantLinear, quantize_model
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, World

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
T = IDS.shape[1]
LAYERED = [n for n in tiny.peft_configs("llama") if n.startswith(("lora", "dora", "ia3"))]


def attached(model: PreTrainedModel) -> tuple[PreTrainedModel, AdapterHost]:
    """A copy of the model with adapters' wrappers."""
    model = copy.deepcopy(model)
    return model, attach(model, BaseModel.from_model(model))


def bound(saved: SavedAdapter, base: BaseModel) -> BoundAdapter:
    packed = pack(saved.compile(base), torch.float32)
    return bind(packed.digest, packed.layout, packed.data, 0)


def whole(*parts: tuple[BoundAdapter, float]) -> AdapterBatch:
    """A batch of one sequence, all of its logits computed."""
    segments = [Segment(0, T, adapter, weight) for adapter, weight in parts]
    return AdapterBatch(segments, segments)


# -- nothing where there is nothing ------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3], ids=lambda m: m.__name__)
@pytest.mark.parametrize("quantization", ["none", "int8"])
@torch.inference_mode()
def test_without_adapters_the_logits_are_the_models_bit_for_bit(
    make: Callable[[], PreTrainedModel], quantization: Any
) -> None:
    plain = make()
    quantize_model(plain, quantization)
    model, host = attached(plain)
    expected = plain(IDS).logits
    elsewhere = BoundAdapter("d", {"nowhere.at_all": ModuleWeights(bias=torch.ones(1))})
    for batch in (AdapterBatch(), whole((elsewhere, 1.0)), AdapterBatch([], [], [])):
        host.batch = batch
        assert torch.equal(model(IDS).logits, expected)
    again = plain(IDS).logits  # the copy shares nothing with it
    assert torch.equal(again, expected)


def test_what_a_primitive_can_act_on_is_wrapped(world: World) -> None:
    model, host = attached(world.model)
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, AdapterModule)}
    expected = {
        name
        for name, m in world.model.named_modules()
        if isinstance(m, nn.Linear | Conv1D | nn.LayerNorm)
    }
    assert set(wrappers) == expected
    for name, wrapper in wrappers.items():
        assert wrapper.path == name
        assert wrapper.is_output == (name == "lm_head")
        assert type(wrapper.base) is type(world.model.get_submodule(name))
        assert wrapper._host is host
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, AdapterEmbedding)
    assert torch.equal(embedding.weight, world.model.get_input_embeddings().weight)


# -- one module, each primitive alone ----------------------------------------------------------

N_IN, N_OUT = 24, 20


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(N_OUT, N_IN)
    nn.init.normal_(conv.bias)
    return {
        "linear": nn.Linear(N_IN, N_OUT),
        "no bias": nn.Linear(N_IN, N_OUT, bias=False),
        "conv1d": conv,
        "nf4": QuantLinear(torch.randn(N_OUT, N_IN), torch.randn(N_OUT), "nf4"),
        "int8": QuantLinear(torch.randn(N_OUT, N_IN), None, "int8"),
    }


def weights(seed: int, rank: int = 4) -> ModuleWeights:
    """Everything that an adapter may do at a linear module."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    low_rank = (noise(rank, N_IN).T, noise(N_OUT, rank).T, 0.75)
    return ModuleWeights(low_rank, noise(N_IN), noise(N_OUT), noise(N_OUT))


def only(given: ModuleWeights, *names: str) -> ModuleWeights:
    return ModuleWeights(**{name: getattr(given, name) for name in names})


def formula(base: nn.Module, x: Tensor, parts: list[tuple[ModuleWeights, float]]) -> Tensor:
    """One row: y = (W (x ⊙ v_in) + b + Σ w·s·B (A (x ⊙ v_in))) ⊙ v_out + Σ w·Δb."""
    for part, _ in parts:
        x = x if part.input_scale is None else x * part.input_scale
    y = base(x)
    for part, weight in parts:
        if part.low_rank is not None:
            a_t, b_t, scale = part.low_rank
            y = y + weight * scale * (x @ a_t @ b_t)
    for part, _ in parts:
        y = y if part.output_scale is None else y * part.output_scale
    for part, weight in parts:
        y = y if part.bias is None else y + weight * part.bias
    return y


PRIMITIVES = ["low_rank", "input_scale", "output_scale", "bias"]


@pytest.mark.parametrize("kind", modules())
@pytest.mark.parametrize("names", [*([name] for name in PRIMITIVES), PRIMITIVES], ids="+".join)
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_rows_of_a_segment_get_its_primitives(kind: str, names: list[str], folded: bool) -> None:
    """Rows of the base, of an adapter, of a mixture of two, and of one that is not here."""
    base, host = modules()[kind], AdapterHost()
    layer = AdapterModule(base, "m", host, is_output=False)
    first, second = only(weights(1), *names), only(weights(2, rank=7), *names)
    host.batch = AdapterBatch(
        tokens=[
            Segment(1, 3, BoundAdapter("a", {"m": first})),
            Segment(3, 4, BoundAdapter("a", {"m": first}), -0.5),
            Segment(3, 4, BoundAdapter("b", {"m": second}), 2.0),
            Segment(4, 6, BoundAdapter("b", {"m": second})),
            Segment(6, 7, BoundAdapter("c", {"elsewhere": first})),
        ],
        outputs=[Segment(0, 8, BoundAdapter("a", {"m": second}))],
    )
    rows: list[list[tuple[ModuleWeights, float]]] = [
        [], [(first, 1.0)], [(first, 1.0)], [(first, -0.5), (second, 2.0)],
        [(second, 1.0)], [(second, 1.0)], [], [],
    ]  # fmt: skip
    x = torch.randn(8, N_IN)
    before = x.clone()
    y = layer(x if folded else x[None])
    assert y.shape == ((8, N_OUT) if folded else (1, 8, N_OUT))
    assert torch.equal(x, before)
    untouched = base(x)
    for i, parts in enumerate(rows):
        row = y.view(8, N_OUT)[i]
        torch.testing.assert_close(row, formula(base, x[i : i + 1], parts)[0], atol=2e-5, rtol=1e-5)
        assert torch.equal(row, untouched[i]) == (not parts)


@torch.inference_mode()
def test_a_bias_on_a_norm() -> None:
    norm, host = nn.LayerNorm(N_IN), AdapterHost()
    layer = AdapterModule(norm, "norm", host, is_output=False)
    delta = torch.randn(N_IN)
    adapter = BoundAdapter("a", {"norm": ModuleWeights(bias=delta)})
    host.batch = AdapterBatch([Segment(1, 3, adapter, 0.5)])
    x = torch.randn(1, 4, N_IN)
    expected = norm(x)
    expected[:, 1:3] += 0.5 * delta
    torch.testing.assert_close(layer(x), expected)


@torch.inference_mode()
def test_the_output_embedding_has_segments_of_its_own() -> None:
    """Its rows are those of which logits are computed, not the batch's tokens."""
    base, host = modules()["linear"], AdapterHost()
    given = weights(1)
    adapter = BoundAdapter("a", {"m": given})
    host.batch = AdapterBatch(tokens=[Segment(5, 9, adapter)], outputs=[Segment(1, 2, adapter)])
    x = torch.randn(1, 2, N_IN)
    y = AdapterModule(base, "m", host, is_output=True)(x)
    assert torch.equal(y[0, 0], base(x)[0, 0])
    torch.testing.assert_close(y[0, 1], formula(base, x[0, 1:], [(given, 1.0)])[0])


@torch.inference_mode()
def test_virtual_rows_replace_embeddings(world: World) -> None:
    model, host = attached(world.model)
    embedding = model.get_input_embeddings()
    expected = world.model.get_input_embeddings()(IDS)
    rows = torch.randn(3, world.base.hidden_size)
    host.batch = AdapterBatch(virtual=[VirtualRows(0, 2, rows[:2]), VirtualRows(7, 8, rows[2:])])
    hidden = embedding(IDS)
    expected[0, 0:2], expected[0, 7] = rows[:2], rows[2]
    assert torch.equal(hidden, expected)
    host.batch = AdapterBatch()
    assert torch.equal(embedding(IDS), world.model.get_input_embeddings()(IDS))


# -- whole models against PEFT -----------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERED)
@torch.inference_mode()
def test_logits_are_pefts(name: str, world: World) -> None:
    model, host = attached(world.model)
    host.batch = whole((bound(world.saved(name), world.base), 1.0))
    logits = model(IDS).logits
    expected = world.in_peft(name)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (expected - world.model(IDS).logits).abs().max() > 0.05


@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
@torch.inference_mode()
def test_logits_after_virtual_tokens_are_pefts(name: str, world: World) -> None:
    model, host = attached(world.model)
    rows = bound(world.saved(name), world.base).virtual_tokens
    assert rows is not None
    n = len(rows)
    host.batch = AdapterBatch(virtual=[VirtualRows(0, n, rows)])
    logits = model(torch.cat([torch.zeros(1, n, dtype=torch.long), IDS], dim=1)).logits
    expected = world.in_peft(name)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_mixture_is_pefts_weighted_sum(world: World) -> None:
    parts = [("lora-r4", 0.75), ("lora-r8-all", -0.5), ("lora_bias", 1.5)]
    model, host = attached(world.model)
    host.batch = whole(*((bound(world.saved(n), world.base), weight) for n, weight in parts))
    oracle = tiny.PeftOracle(world.model, [(world.folders[n], weight) for n, weight in parts])
    torch.testing.assert_close(
        model(IDS).logits[0], oracle.logits(IDS[0].tolist()), atol=1e-4, rtol=0
    )


def opt() -> PreTrainedModel:
    """Its feed-forward block folds the batch: linears and norms see `[rows, in]`."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=tiny.VOCAB, max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules="all-linear", bias="all", task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["fc1", "q_proj"], use_dora=True),
        peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    ],
    ids=["lora", "dora", "ia3"],
)
@torch.inference_mode()
def test_a_model_that_folds_its_batch(config: peft.PeftConfig, tmp_path: Path) -> None:
    plain = opt()
    folder = tiny.save_random_adapter(plain, config, tmp_path)
    model, host = attached(plain)
    host.batch = whole((bound(SavedAdapter.read(folder), BaseModel.from_model(plain)), 1.0))
    expected = tiny.PeftOracle(plain, [(folder, 1.0)]).logits(IDS[0].tolist())
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-4, rtol=0)
    host.batch = AdapterBatch()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
