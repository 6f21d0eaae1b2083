"""Adapters on a model: the model's own logits without one, with one its formula's and PEFT's."""

from __future__ import annotations

import copy
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

from peftcore import layers
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
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.packing import BoundAdapter, ModuleWeights, bind, pack
from peftcore.primitives import BiasDelta, LowRank, ModuleOverride, Primitive, RowOverride
from peftcore.program import AdapterProgram
from peftcore.quant import quantize_model
from tests import tiny
from tests.peftcore.test_quant import dequantized
from tests.peftcore.worlds import SavedAdapter, World

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
T = IDS.shape[1]
#: Not those that change the rows of tokens alone: IDS has none of these tokens.
LAYERED = [
    name
    for name in tiny.peft_configs("llama")
    if name not in tiny.prompt_configs("CAUSAL_LM") and not name.startswith("tokens")
]
#: Where adapters' low-rank updates, scales and biases at linear modules are computed.
WAYS = ["torch", "kernels"]


def attached(model: PreTrainedModel) -> tuple[PreTrainedModel, AdapterHost]:
    """A copy of the model with adapters' wrappers."""
    model = copy.deepcopy(model)
    return model, attach(model, BaseModel.from_model(model))


def bound(program: AdapterProgram, host: AdapterHost, way: str) -> BoundAdapter:
    """Through a buffer, as the server has it."""
    packed = pack(program, torch.float32)
    if way == "torch":
        return bind(packed.digest, packed.layout, packed.data, 0)
    assert kernels() is not None, kernels_status()
    assert host.linears is not None
    return bind(packed.digest, packed.layout, packed.data, 0, host.linears)


def whole(*parts: tuple[BoundAdapter, float]) -> AdapterBatch:
    """A batch of one sequence, all of its logits computed."""
    segments = [Segment(0, T, adapter, weight) for adapter, weight in parts]
    return AdapterBatch(segments, segments)


# -- nothing where there is nothing ------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3], ids=lambda m: m.__name__)
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@torch.inference_mode()
def test_without_adapters_the_logits_are_the_models_bit_for_bit(
    make: Callable[[], PreTrainedModel], quantization: Any
) -> None:
    plain = make()
    quantize_model(plain, quantization)
    model, host = attached(plain)
    expected = plain(IDS).logits
    nowhere = AdapterProgram("d", "ANY", [BiasDelta("nowhere.at_all", torch.ones(1))])
    packed = pack(nowhere, torch.float32)
    for_kernels = bind("d", packed.layout, packed.data, 0, {"nowhere.at_all": (1, 1)})
    assert len(for_kernels.kernel) == 1
    elsewhere = whole((bound(nowhere, host, "torch"), 1.0), (for_kernels, 1.0))
    for batch in (AdapterBatch(), elsewhere, AdapterBatch([], [], [])):
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
    linears = {
        name: tuple(reversed(m.weight.T.shape if isinstance(m, Conv1D) else m.weight.shape))
        for name, m in plain.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    assert host.linears == linears
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


def test_kernels_are_for_float32_and_for_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _, host = attached(tiny.llama().bfloat16())
    assert host.linears is None
    monkeypatch.setattr(layers, "select", lambda device: None)
    _, host = attached(tiny.llama())
    assert host.linears is None


@torch.inference_mode()
def test_steps_of_the_same_segments_share_what_the_kernels_make_of_them(world: World) -> None:
    """Decode steps follow each other with the same adapters."""
    model, host = attached(world.model)
    program = world.saved("lora-r8-all").compile(world.base)
    one, other = bound(program, host, "kernels"), bound(program, host, "kernels")

    def made(*segments: Segment) -> Any:
        host.batch = AdapterBatch(segments, [Segment(0, 1, *segments[0][2:])])
        batch = host.kernel_tokens
        assert host.kernel_outputs is not batch
        host.batch = AdapterBatch()
        assert host.kernel_tokens is None
        return batch

    step = [Segment(0, 5, one), Segment(5, T, other)]
    batch = made(*step)
    assert made(*map(copy.copy, step)) is batch
    for changed in (
        [Segment(0, 5, one), Segment(5, T, one)],
        [Segment(0, 4, one), Segment(4, T, other)],
        [Segment(0, 5, one), Segment(5, T, other, 0.5)],
        step[:1],
    ):
        host.batch = AdapterBatch(changed, changed)
        assert host.kernel_tokens not in (None, batch)
        logits = model(IDS).logits
        alone, fresh = attached(world.model)
        fresh.batch = AdapterBatch(changed, changed)
        assert torch.equal(logits, alone(IDS).logits)
        made(*step)


# -- norms and embeddings ----------------------------------------------------------------------

N_IN = 24


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
    low_rank, replaced = LowRank("e", a, b, 0.75), ModuleOverride("e", other, None)
    new_rows = RowOverride("e", (29, 7, 0), rows)

    def adapter(*primitives: Primitive) -> BoundAdapter:
        return bound(AdapterProgram("d", "ANY", primitives), host, "torch")

    host.batch = AdapterBatch(
        tokens=[
            Segment(1, 3, adapter(replaced)),
            Segment(3, 5, adapter(low_rank), -2.0),
            Segment(5, 8, adapter(new_rows)),
            Segment(8, 11, adapter(low_rank, replaced, new_rows)),
        ],
        virtual=[VirtualRows(9, 10, torch.full((1, DIM), 7.0))],
    )
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERED)
@torch.inference_mode()
def test_logits_are_pefts(name: str, way: str, world: World) -> None:
    model, host = attached(world.model)
    host.batch = whole((bound(world.saved(name).compile(world.base), host, way), 1.0))
    logits = model(IDS).logits
    expected = world.in_peft(name)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (expected - world.model(IDS).logits).abs().max() > 0.05


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["lora-r8-all", "lora-head-saved", "dora", "ia3", "vera"])
@torch.inference_mode()
def test_logits_over_a_quantized_base_are_pefts_over_its_weights(
    name: str, quantization: Any, way: str, world: World
) -> None:
    """peft has the same adapter on a float model of the weights that the codes stand for."""
    plain = copy.deepcopy(world.model)
    output = plain.get_output_embeddings()
    if output.weight is plain.get_input_embeddings().weight:  # of which the codes are no copy
        output.weight = copy.deepcopy(output.weight)
    quantized = copy.deepcopy(plain)
    quantize_model(quantized, quantization)
    for module in plain.modules():
        if isinstance(module, nn.Linear | Conv1D):
            choice = "int8" if module is output else quantization
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            values = dequantized(weight.contiguous(), choice)
            module.weight.copy_(values.T if isinstance(module, Conv1D) else values)
    saved = world.saved(name)
    program = saved.compile(BaseModel.from_model(plain))
    model, host = attached(quantized)
    host.batch = whole((bound(program, host, way), 1.0))
    oracle = tiny.PeftOracle(plain, [(world.folders[name], 1.0)])
    expected = oracle.logits(IDS[0].tolist())
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-4, rtol=0)
    assert (expected - plain(IDS).logits[0]).abs().max() > 0.05
    assert (world.in_peft(name)(input_ids=IDS).logits[0] - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
@torch.inference_mode()
def test_logits_after_virtual_tokens_are_pefts(name: str, world: World) -> None:
    model, host = attached(world.model)
    rows = bound(world.saved(name).compile(world.base), host, "torch").virtual_tokens
    assert rows is not None
    n = len(rows)
    host.batch = AdapterBatch(virtual=[VirtualRows(0, n, rows)])
    logits = model(torch.cat([torch.zeros(1, n, dtype=torch.long), IDS], dim=1)).logits
    expected = world.in_peft(name)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_mixture_is_pefts_weighted_sum(way: str, world: World) -> None:
    parts = [("lora-r4", 0.75), ("lora-r8-all", -0.5), ("lora_bias", 1.5)]
    model, host = attached(world.model)
    programs = [(world.saved(n).compile(world.base), weight) for n, weight in parts]
    host.batch = whole(*((bound(program, host, way), weight) for program, weight in programs))
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
@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_model_that_folds_its_batch(way: str, config: peft.PeftConfig, tmp_path: Path) -> None:
    plain = opt()
    folder = tiny.save_random_adapter(plain, config, tmp_path)
    model, host = attached(plain)
    program = SavedAdapter.read(folder).compile(BaseModel.from_model(plain))
    host.batch = whole((bound(program, host, way), 1.0))
    expected = tiny.PeftOracle(plain, [(folder, 1.0)]).logits(IDS[0].tolist())
    torch.testing.assert_close(model(IDS).logits[0], expected, atol=1e-4, rtol=0)
    host.batch = AdapterBatch()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
