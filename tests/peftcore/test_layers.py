"""Adapters on a model: the model's own logits without one, with one its formula's and PEFT's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peftcore.base import BaseModel
from peftcore.layers import (
    AdapterBatch,
    AdapterEmbedding,
    AdapterHost,
    AdapterLinear,
    AdapterModule,
    AdapterNorm,
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


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3], ids=lambda m: m.__name__)
def test_what_a_primitive_can_act_on_is_wrapped(make: Callable[[], PreTrainedModel]) -> None:
    plain = make()
    model, host = attached(plain)
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, AdapterModule)}
    kinds: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
        AdapterLinear: (nn.Linear, Conv1D),
        AdapterNorm: (nn.LayerNorm, LlamaRMSNorm, Gemma3RMSNorm),
        AdapterEmbedding: (nn.Embedding,),
    }
    for wrapper_class, classes in kinds.items():
        expected = {name for name, m in plain.named_modules() if isinstance(m, classes)}
        assert {n for n, w in wrappers.items() if type(w) is wrapper_class} == expected
        assert expected
    for name, wrapper in wrappers.items():
        assert wrapper.path == name
        assert wrapper.is_output == (name == "lm_head")
        assert type(wrapper.base) is type(plain.get_submodule(name))
        assert wrapper._host is host
    embedding = model.get_input_embeddings()
    assert [w for w in wrappers.values() if getattr(w, "is_input", False)] == [embedding]


def test_a_wrapper_has_the_attributes_of_its_module() -> None:
    """Model code reads them: a norm's weight for its dtype, an embedding's padding."""
    model, _ = attached(tiny.gemma3())
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, AdapterEmbedding)
    assert embedding.weight is embedding.base.weight
    assert (embedding.num_embeddings, embedding.embedding_dim) == (tiny.VOCAB, 64)
    assert embedding.padding_idx == embedding.base.padding_idx
    norm = model.get_submodule("model.norm")
    assert norm.eps == norm.base.eps  # type: ignore[union-attr]
    head = model.get_output_embeddings()
    assert head.in_features == 64
    assert head.bias is None
    assert not hasattr(head, "nothing_like_it")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = head.nothing_like_it


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
    # Row vectors times blocks: not symmetric, so that the other orientation differs.
    rotation = torch.linalg.qr(noise(N_IN // 4, 4, 4)).Q
    override = (noise(N_OUT, N_IN), noise(N_OUT) if seed % 2 else None)
    rows = (torch.tensor([17, 0, 5]), noise(3, N_IN))
    return ModuleWeights(
        low_rank, noise(N_IN), noise(N_OUT), noise(N_OUT), rotation, override, rows
    )


def only(given: ModuleWeights, *names: str) -> ModuleWeights:
    return ModuleWeights(**{name: getattr(given, name) for name in names})


def formula(base: nn.Module, x: Tensor, parts: list[tuple[ModuleWeights, float]]) -> Tensor:
    """One row, as `peftcore.program` states it, with dense matrices."""
    for part, _ in parts:
        x = x if part.rotation is None else x @ torch.block_diag(*part.rotation)
    for part, _ in parts:
        x = x if part.input_scale is None else x * part.input_scale
    y = base(x)
    for part, _ in parts:
        if part.override is not None:
            weight, bias = part.override
            y = x @ weight.T if bias is None else x @ weight.T + bias
    for part, weight in parts:
        if part.low_rank is not None:
            a_t, b_t, scale = part.low_rank
            y = y + weight * scale * (x @ a_t @ b_t)
    for part, _ in parts:
        y = y if part.output_scale is None else y * part.output_scale
    for part, weight in parts:
        y = y if part.bias is None else y + weight * part.bias
    for part, _ in parts:
        if part.rows is not None:
            ids, rows = part.rows
            for i, row in zip(ids.tolist(), rows, strict=True):
                y[:, i] = x @ row + (0 if base.bias is None else base.bias[i])
    return y


#: Bottlenecks act on a branch of a layer: `test_bottleneck` has them.
PRIMITIVES = [
    f.name for f in dataclasses.fields(ModuleWeights) if f.name not in ("bottleneck", "is_stream")
]


@pytest.mark.parametrize("kind", modules())
@pytest.mark.parametrize("names", [*([name] for name in PRIMITIVES), PRIMITIVES], ids="+".join)
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_rows_of_a_segment_get_its_primitives(kind: str, names: list[str], folded: bool) -> None:
    """Rows of the base, of an adapter, of a mixture of two, and of one that is not here."""
    base, host = modules()[kind], AdapterHost()
    layer = AdapterLinear(base, "m", host)
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


@pytest.mark.parametrize("kind", modules())
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    """Alone in a batch, or between rows of the base and of another adapter."""
    base, host = modules()[kind], AdapterHost()
    layer = AdapterLinear(base, "m", host)
    mine, other = BoundAdapter("a", {"m": weights(1)}), BoundAdapter("b", {"m": weights(2)})
    x = torch.randn(1, 9, N_IN)
    host.batch = AdapterBatch([Segment(2, 5, mine), Segment(5, 8, other)])
    together = layer(x)
    for i in range(2, 5):
        host.batch = AdapterBatch([Segment(0, 1, mine)])
        alone = layer(x[:, i : i + 1])
        torch.testing.assert_close(alone[0, 0], together[0, i], atol=2e-5, rtol=1e-5)


def norms() -> dict[str, tuple[nn.Module, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Each with its formula of x, another weight and another bias."""

    def normed(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    gemma = Gemma3RMSNorm(N_IN)
    nn.init.normal_(gemma.weight)
    layer = nn.LayerNorm(N_IN)
    nn.init.normal_(layer.bias)
    return {
        "layer": (layer, lambda x, w, b: F.layer_norm(x, (N_IN,), w, b)),
        "llama": (LlamaRMSNorm(N_IN), lambda x, w, b: normed(x) * w),
        "gemma": (gemma, lambda x, w, b: normed(x) * (1 + w)),
    }


@pytest.mark.parametrize("kind", norms())
@pytest.mark.parametrize("shape", ["rows", "folded", "rows, heads", "heads, rows"])
@torch.inference_mode()
def test_a_norm_with_other_parameters(kind: str, shape: str) -> None:
    """As many heads as rows: which is which, only memory tells."""
    norm, formula = norms()[kind]
    host = AdapterHost()
    host.num_rows = 5
    layer = AdapterNorm(norm, "norm", host)
    weight, bias, delta = torch.randn(N_IN), torch.randn(N_IN), torch.randn(N_IN)
    bias = bias if kind == "layer" else torch.zeros(N_IN)
    given = ModuleWeights(override=(weight, bias if kind == "layer" else None))
    both = ModuleWeights(override=(weight, bias if kind == "layer" else None), bias=delta)
    host.batch = AdapterBatch(
        [
            Segment(1, 3, BoundAdapter("a", {"norm": given})),
            Segment(3, 4, BoundAdapter("b", {"norm": ModuleWeights(bias=delta)}), 0.5),
            Segment(4, 5, BoundAdapter("c", {"norm": both})),
        ]
    )
    rows = torch.randn(5, N_IN) if shape in ("rows", "folded") else torch.randn(5, 5, N_IN)
    x = {"rows": rows[None], "folded": rows, "rows, heads": rows[None]}.get(
        shape, rows[None].transpose(1, 2)
    )
    expected = norm(rows)
    expected[1:3] = formula(rows[1:3], weight, bias)
    expected[3] += 0.5 * delta
    expected[4] = formula(rows[4], weight, bias) + delta
    if shape == "folded":
        torch.testing.assert_close(layer(x), expected)
        return
    y = layer(x)[0]
    y = y.transpose(0, 1) if shape == "heads, rows" else y
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[0], norm(rows)[0])


@torch.inference_mode()
def test_an_override_without_a_bias_has_none() -> None:
    norm, _ = norms()["layer"]
    host = AdapterHost()
    host.num_rows = 2
    weight = torch.randn(N_IN)
    adapter = BoundAdapter("a", {"norm": ModuleWeights(override=(weight, None))})
    host.batch = AdapterBatch([Segment(1, 2, adapter)])
    x = torch.randn(1, 2, N_IN)
    y = AdapterNorm(norm, "norm", host)(x)
    torch.testing.assert_close(y[0, 1], F.layer_norm(x[0, 1], (N_IN,), weight))
    assert torch.equal(y[0, 0], norm(x)[0, 0])


@torch.inference_mode()
def test_a_norm_whose_rows_cannot_be_found_is_not_guessed() -> None:
    norm, _ = norms()["layer"]
    host = AdapterHost()
    host.num_rows = 3
    layer = AdapterNorm(norm, "norm", host)
    x = torch.randn(1, 12, N_IN)  # rows and heads in one
    assert torch.equal(layer(x), norm(x))
    adapter = BoundAdapter("a", {"norm": ModuleWeights(bias=torch.ones(N_IN))})
    host.batch = AdapterBatch([Segment(1, 2, adapter)])
    with pytest.raises(RuntimeError, match=r"norm: no dimension of \(1, 12, 24\) counts 3 rows"):
        layer(x)


NUM, DIM = 30, 12


@pytest.mark.parametrize("scaled", [False, True])
@torch.inference_mode()
def test_an_embedding_with_other_rows(scaled: bool) -> None:
    """What the base scales its rows with, it scales the adapters' with."""
    torch.manual_seed(0)
    base = Gemma3TextScaledWordEmbedding(NUM, DIM, 3, 2.5) if scaled else nn.Embedding(NUM, DIM, 3)
    scale, host = 2.5 if scaled else 1.0, AdapterHost()
    layer = AdapterEmbedding(base, "e", host, is_input=True)
    other, rows = torch.randn(NUM, DIM), torch.randn(3, DIM)
    a, b = torch.randn(2, NUM), torch.randn(DIM, 2)
    ids = torch.tensor([[7, 3, 8, 7, 3, 1, 29, 7, 3, 0, 7]])
    chosen = torch.tensor([29, 7, 0])
    low_rank = (a.T, b.T, 0.75)
    host.batch = AdapterBatch(
        tokens=[
            Segment(1, 3, BoundAdapter("a", {"e": ModuleWeights(override=(other, None))})),
            Segment(3, 5, BoundAdapter("b", {"e": ModuleWeights(low_rank=low_rank)}), -2.0),
            Segment(5, 8, BoundAdapter("c", {"e": ModuleWeights(rows=(chosen, rows))})),
            Segment(
                8, 11,
                BoundAdapter("d", {"e": ModuleWeights(
                    low_rank, override=(other, None), rows=(chosen, rows))}),
            ),
        ],
        virtual=[VirtualRows(9, 10, torch.full((1, DIM), 7.0))],
    )  # fmt: skip
    w, t = base.weight, ids[0].tolist()
    expected = scale * torch.stack(
        [
            w[t[0]], other[t[1]], other[t[2]],
            w[t[3]] - 1.5 * b @ a[:, t[3]], w[t[4]] - 1.5 * b @ a[:, t[4]],
            w[t[5]], rows[0], rows[1],
            other[t[8]] + 0.75 * b @ a[:, t[8]], torch.full((DIM,), 7.0 / scale), rows[1],
        ]
    )  # fmt: skip
    y = layer(ids)
    torch.testing.assert_close(y[0], expected)
    assert torch.equal(y[0, 0], base(ids)[0, 0])
    assert torch.equal(y[0, 5], base(ids)[0, 5])
    assert host.num_rows == 11


@torch.inference_mode()
def test_the_output_embedding_has_segments_of_its_own() -> None:
    """Its rows are those of which logits are computed, not the batch's tokens."""
    base, host = modules()["linear"], AdapterHost()
    given = weights(1)
    other = BoundAdapter("b", {"elsewhere": given})
    outputs = [Segment(1, 2, BoundAdapter("a", {"m": given}))]
    host.batch = AdapterBatch(tokens=[Segment(5, 9, other)], outputs=outputs)
    x = torch.randn(1, 2, N_IN)
    y = AdapterLinear(base, "m", host, is_output=True)(x)
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
