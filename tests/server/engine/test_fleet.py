"""Classifiers and embeddings in mixed batches: each row is what peft computes for it alone."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.build import assemble
from server.engine.sequence import PoolingKind, PoolingParams, SamplingParams
from server.engine.sequence import Sequence as Request
from server.errors import Unprocessable
from server.models.loader import load_model
from server.runtime import Runtime
from server.settings import Settings
from tests import tiny
from tests.server.models import zoo

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fleet:
    """One base, and adapters of many methods with heads of different sizes."""

    base: PreTrainedModel
    runtime: Runtime
    #: Name → folder, task and number of labels.
    adapters: dict[str, tuple[Path, str, int]]

    def run(self, requests: Sequence[tuple[str, list[int], PoolingParams | None]]) -> list[Request]:
        """All requests at once, by the engine's own steps; without pooling it generates."""
        engine, made = self.runtime.engine, []
        for i, (name, prompt, pooling) in enumerate(requests):
            with self.runtime.adapters.lease(name) as lease:
                seq = Request(
                    (f"r{time.monotonic_ns()}-{i}", 0), prompt,
                    SamplingParams(max_tokens=5, temperature=0, ignore_eos=True),
                    adapters=lease.uses, num_virtual_tokens=lease.num_virtual_tokens,
                    virtual_kv=lease.virtual_kv, max_len=self.runtime.max_model_len,
                    pooling=pooling,
                )  # fmt: skip
            engine.add(seq)
            made.append(seq)
        for _ in range(4000):
            if not engine.has_work:
                return made
            for output in engine.step():
                assert output.error is None, output.error
            if not engine.scheduler.running:
                time.sleep(0.001)
        raise AssertionError("the engine did not finish")

    def probabilities(self, name: str, ids: list[int]) -> Tensor:
        """peft's, of one text alone."""
        folder, task, num_labels = self.adapters[name]
        model = tiny.for_task(self.base, task, num_labels)
        return peft_logits(model, folder, ids)[0].softmax(dim=-1)


@torch.inference_mode()
def peft_logits(model: PreTrainedModel, folder: Path, ids: list[int]) -> Tensor:
    """By peft and transformers' eager attention: `[1, labels]`, or of tokens `[1, len, labels]`."""
    model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle: Any = peft.PeftModel.from_pretrained(model, folder).eval()
        given = torch.tensor([ids])
        inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        if oracle.peft_type == "MULTITASK_PROMPT_TUNING":
            inputs["task_ids"] = torch.tensor([0])
        logits: Tensor = oracle(**inputs).logits
    return logits if logits.dim() == 2 else logits[:, -len(ids) :]


def configs_of(model_type: str, task: str) -> dict[str, peft.PeftConfig]:
    """Those whose files hold a head: peft saves none with trainable tokens alone. LoHa, LoKr and
    OFT act on gpt2's output embedding, which a classifier has not."""
    headless = {"tokens", "tokens-drawn"}
    on_head = ("loha", "lokr", "oft", "coft") if model_type == "gpt2" else ()
    configs = tiny.peft_configs(model_type, task)
    dropped = {n for n in configs if n in headless or (on_head and n.startswith(on_head))}
    return {name: config for name, config in configs.items() if name not in dropped}


TOKEN_CONFIGS = ["lora-r4", "dora", "ia3", "prefix", "prompt", "norms", "oft", "lokr", "lora-saved"]


def base_of(name: str) -> PreTrainedModel:
    return tiny.bert("FEATURE_EXTRACTION") if name == "bert" else getattr(tiny, name)()


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder = tmp_path_factory.mktemp(request.param)
    base = (
        tiny.bert("FEATURE_EXTRACTION")
        if request.param == "bert"
        else getattr(tiny, request.param)()
    )
    runtime = tiny.runtime(
        base, folder / "data", max_num_batched_tokens=64, max_num_seqs=24, adapter_memory="24MiB"
    )
    adapters: dict[str, tuple[Path, str, int]] = {}
    for task in ("SEQ_CLS", "TOKEN_CLS"):
        configs = configs_of(base.config.model_type, task)
        names = [n for n in configs if task == "SEQ_CLS" or n in TOKEN_CONFIGS]
        for seed, kind in enumerate(names):
            num_labels = 2 + seed % 5
            path = folder / f"{task}-{kind}"
            model = tiny.for_task(base, task, num_labels)
            tiny.save_random_adapter(model, configs[kind], path, seed)
            adapters[path.name] = (path, task, num_labels)
            tiny.register(runtime, path.name, path)
    yield Fleet(base, runtime, adapters)
    runtime.close()


def texts(seed: int, n: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 256) for _ in range(rng.randint(2, longest))] for _ in range(n)]


def test_a_mixed_batch_of_classifiers_equals_peft(fleet: Fleet) -> None:
    """All methods at once, classifying texts and tokens, twice with different texts."""
    names = list(fleet.adapters)
    prompts = texts(1, len(names))
    requests = [
        (name, prompt, PoolingParams(fleet.adapters[name][1]))  # type: ignore[arg-type]
        for name, prompt in zip(names, prompts, strict=True)
    ]
    errors = {}
    for name, prompt, seq in zip(names, prompts, fleet.run(requests), strict=True):
        expected = fleet.probabilities(name, prompt)
        assert seq.pooled.shape == expected.shape, name
        errors[name] = float((seq.pooled - expected).abs().max())
    assert max(errors.values()) <= TOLERANCE, errors
    fleet.runtime.check_integrity()


def test_heads_differ(fleet: Fleet) -> None:
    """The oracle must tell adapters apart, and not say that all classes are as likely."""
    prompt = texts(3, 1)[0]
    found = [fleet.probabilities(name, prompt) for name in list(fleet.adapters)[:6]]
    sizes = {p.shape[-1] for p in found}
    assert len(sizes) >= 4
    assert all(float(p.max() - p.min()) > 0.01 for p in found)
    alike = [p for p in found if p.shape == found[0].shape]
    assert all(float((p - found[0]).abs().max()) > 1e-3 for p in alike[1:])


def embeddings(hidden: Tensor, kind: str) -> Tensor:
    """Of one text's hidden states `[len, hidden]`, as sentence-transformers pools them."""
    return {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[kind]


@torch.inference_mode()
def hidden_states(fleet: Fleet, name: str | None, ids: list[int]) -> Tensor:
    """`[len, hidden]` of the text's own tokens: by transformers, or under an adapter by peft."""
    model = copy.deepcopy(fleet.base)
    if name is not None:
        folder, task, num_labels = fleet.adapters[name]
        model = tiny.for_task(fleet.base, task, num_labels)
    model.set_attn_implementation("eager")
    found: list[Tensor] = []
    model.base_model.register_forward_hook(lambda m, a, out: found.append(out.last_hidden_state))
    if name is None:
        model(torch.tensor([ids]))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = torch.tensor([ids])
            oracle = peft.PeftModel.from_pretrained(model, folder).eval()
            oracle(input_ids=given, attention_mask=torch.ones_like(given))
    return found[0][0, -len(ids) :]


EMBEDDED = [None, "SEQ_CLS-lora-r8-all", "SEQ_CLS-ia3", "SEQ_CLS-prefix", "SEQ_CLS-prompt"]
KINDS: tuple[PoolingKind, ...] = ("mean", "cls", "last")


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_equal_transformers(fleet: Fleet, normalize: bool) -> None:
    """Base rows and adapters' in one batch, longer than a step's budget where it may be cut."""
    longest = 60 if fleet.base.config.model_type == "bert" else 150
    prompts = texts(5, len(EMBEDDED) * 3, longest)
    prompts[0] = prompts[0] * 40
    prompts = [p[: longest - 1] for p in prompts]
    wanted = [(name, kind) for name in EMBEDDED for kind in KINDS]
    requests = [
        (name or "tiny", prompt, PoolingParams(kind, normalize))
        for (name, kind), prompt in zip(wanted, prompts, strict=True)
    ]
    for round_ in range(2):  # the second round finds blocks of the first in a decoder's cache
        sequences = fleet.run(requests)
        for (name, kind), prompt, seq in zip(wanted, prompts, sequences, strict=True):
            expected = embeddings(hidden_states(fleet, name, prompt), kind)
            if normalize:
                expected = torch.nn.functional.normalize(expected, dim=0)
            torch.testing.assert_close(
                seq.pooled, expected, atol=1e-4, rtol=1e-4, msg=f"{name} {kind} {round_}"
            )
    is_encoder = fleet.base.config.model_type == "bert"
    cached = [
        s.num_cached for s, (_, kind) in zip(sequences, wanted, strict=True) if kind == "last"
    ]
    assert any(cached) != is_encoder
    fleet.runtime.check_integrity()


def test_a_result_does_not_depend_on_the_batch(fleet: Fleet) -> None:
    """Alone, and among all others."""
    names = [n for n in fleet.adapters if "lora-r4" in n or "prefix" in n or "dora" in n]
    prompt = texts(7, 1)[0]

    def request(name: str, ids: list[int]) -> tuple[str, list[int], PoolingParams]:
        return name, ids, PoolingParams(fleet.adapters[name][1])  # type: ignore[arg-type]

    others = [
        request(name, ids)
        for name, ids in zip(fleet.adapters, texts(8, len(fleet.adapters)), strict=True)
    ]
    for name in names:
        alone = fleet.run([request(name, prompt)])[0].pooled
        among = fleet.run([*others[:9], request(name, prompt), *others[9:20]])[9].pooled
        torch.testing.assert_close(alone, among, atol=1e-5, rtol=0)


def test_classifiers_beside_generation(fleet: Fleet) -> None:
    """Generating sequences of a step are what they are alone, and so are the classified ones."""
    if not fleet.runtime.generates:
        pytest.skip("an encoder")
    names = ["SEQ_CLS-lora-r4", "TOKEN_CLS-ia3", "SEQ_CLS-prefix"]
    prompts = texts(9, 6, 100)
    pooled = [
        (name, prompt, PoolingParams(fleet.adapters[name][1]))  # type: ignore[arg-type]
        for name, prompt in zip(names, prompts, strict=False)
    ]
    generated: list[Any] = [("tiny", prompt, None) for prompt in prompts[3:]]
    expected = [s.output_token_ids for s in fleet.run(generated)]
    order = [generated[0], pooled[0], generated[1], pooled[1], generated[2], pooled[2]]
    found = fleet.run(order)
    assert [s.output_token_ids for s in found[::2]] == expected
    for (name, prompt, _), seq in zip(pooled, found[1::2], strict=True):
        want = fleet.probabilities(name, prompt)
        torch.testing.assert_close(seq.pooled, want, atol=TOLERANCE, rtol=0)


def test_an_encoders_sequence_is_never_cut(fleet: Fleet) -> None:
    """Nor does one wait for ever that just fits."""
    if fleet.runtime.generates:
        pytest.skip("a decoder")
    longest = fleet.runtime.max_model_len
    budget = fleet.runtime.engine.scheduler.max_num_batched_tokens
    assert budget >= longest == 128
    prompts = [p * 64 for p in texts(11, 5)]
    prompts = [p[:n] for p, n in zip(prompts, (longest, 100, longest, 3, 90), strict=True)]
    sequences = fleet.run([("tiny", prompt, PoolingParams("mean")) for prompt in prompts])
    for prompt, seq in zip(prompts, sequences, strict=True):
        expected = hidden_states(fleet, None, prompt).mean(dim=0)
        torch.testing.assert_close(seq.pooled, expected, atol=1e-4, rtol=1e-4)
    fleet.runtime.check_integrity()


#: Encoder → what its classifier needs beside PEFT's own choice, and its attention's modules.
OTHER_ENCODERS = {
    "roberta": ([], ["query", "value"]),
    "xlm-roberta": ([], ["query", "dense"]),
    "electra": ([], ["key", "intermediate.dense"]),
    "distilbert": (["pre_classifier"], ["q_lin", "lin1"]),
}


@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_heads_of_other_encoders_equal_peft(name: str, tmp_path: Path) -> None:
    """Heads of two layers, positions that begin behind the padding's, pairs of classes."""
    base = zoo.make_encoder(name)
    runtime = tiny.runtime(base, tmp_path / "data")
    extra, targets = OTHER_ENCODERS[name]
    adapters = {}
    for seed, (task, rank) in enumerate([("SEQ_CLS", 4), ("SEQ_CLS", 8), ("TOKEN_CLS", 2)]):
        config = peft.LoraConfig(
            r=rank, target_modules=targets, task_type=task,
            modules_to_save=extra if task == "SEQ_CLS" and extra else None,
        )  # fmt: skip
        path, num_labels = tmp_path / f"{task}-{rank}", 2 + seed
        tiny.save_random_adapter(tiny.for_task(base, task, num_labels), config, path, seed)
        adapters[path.name] = (path, task, num_labels)
        tiny.register(runtime, path.name, path)
    fleet = Fleet(base, runtime, adapters)
    prompts = [[t % 60 + 4 for t in ids] for ids in texts(13, len(adapters))]
    requests = [
        (n, ids, PoolingParams(adapters[n][1]))  # type: ignore[arg-type]
        for n, ids in zip(adapters, prompts, strict=True)
    ]
    for n, ids, seq in zip(adapters, prompts, fleet.run(requests), strict=True):
        expected = fleet.probabilities(n, ids)
        torch.testing.assert_close(seq.pooled, expected, atol=TOLERANCE, rtol=0, msg=n)
    runtime.close()


def test_adapters_survive_a_restart(tmp_path: Path) -> None:
    """Task, labels and head, from the registry and the packed form."""
    base, path = tiny.bert("FEATURE_EXTRACTION"), tmp_path / "mood"
    config = tiny.peft_configs("bert", "SEQ_CLS")["lora-r4"]
    tiny.save_random_adapter(tiny.for_task(base, "SEQ_CLS"), config, path)
    for start in range(2):
        runtime = tiny.runtime(base, tmp_path / "data")
        if start == 0:
            files = (path / tiny.CONFIG_NAME).read_bytes(), path / tiny.WEIGHTS_NAME
            runtime.adapters.register("mood", *files, b'["a", "b", "c"]')
        with runtime.adapters.lease("mood") as lease:
            assert (lease.task, lease.labels) == ("SEQ_CLS", ("a", "b", "c"))
        fleet = Fleet(base, runtime, {"mood": (path, "SEQ_CLS", 3)})
        (seq,) = fleet.run([("mood", [5, 6, 7], PoolingParams("SEQ_CLS"))])
        expected = fleet.probabilities("mood", [5, 6, 7])
        torch.testing.assert_close(seq.pooled, expected, atol=TOLERANCE, rtol=0)
        runtime.close()


def test_a_pooler_that_the_base_has_not_comes_with_the_adapter(tmp_path: Path) -> None:
    """Its weights in the base are random: a classifier without its own is refused."""
    folder = tmp_path / "base"
    tiny.for_task(tiny.bert("FEATURE_EXTRACTION"), "TOKEN_CLS").save_pretrained(folder)
    loaded = load_model(folder, "none", torch.device("cpu"))
    settings = Settings(data_dir=tmp_path / "data", kv_memory="8MiB")  # type: ignore[arg-type]
    runtime = assemble(settings, loaded, tiny.tokenizer(), "tiny")
    paths = {}
    for name, saved in [("without", None), ("with", ["pooler"])]:
        config = peft.LoraConfig(
            r=4, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=saved
        )
        model = tiny.for_task(tiny.bert("FEATURE_EXTRACTION"), "SEQ_CLS", 3)
        paths[name] = tiny.save_random_adapter(model, config, tmp_path / name)
    files = {
        name: ((path / tiny.CONFIG_NAME).read_bytes(), path / tiny.WEIGHTS_NAME)
        for name, path in paths.items()
    }
    with pytest.raises(Unprocessable, match=r"no weights of its pooler\.dense.*modules_to_save"):
        runtime.adapters.register("without", *files["without"])
    runtime.adapters.register("with", *files["with"])
    base = tiny.bert("FEATURE_EXTRACTION")
    fleet = Fleet(base, runtime, {"with": (paths["with"], "SEQ_CLS", 3)})
    prompts = texts(17, 3)
    classify, mean = PoolingParams("SEQ_CLS"), PoolingParams("mean")
    sequences = fleet.run(
        [("with", prompts[0], classify), ("tiny", prompts[1], mean), ("with", prompts[2], classify)]
    )
    for prompt, seq in [(prompts[0], sequences[0]), (prompts[2], sequences[2])]:
        expected = fleet.probabilities("with", prompt)
        torch.testing.assert_close(seq.pooled, expected, atol=TOLERANCE, rtol=0)
    runtime.close()


def test_token_type_ids_reach_the_model(tmp_path: Path) -> None:
    """Of two texts; beside one text alone, and under an adapter with virtual tokens."""
    base = tiny.bert("FEATURE_EXTRACTION")
    runtime = tiny.runtime(base, tmp_path / "data")
    path = tmp_path / "prompt"
    config = tiny.peft_configs("bert", "SEQ_CLS")["prompt"]
    tiny.save_random_adapter(tiny.for_task(base, "SEQ_CLS"), config, path)
    tiny.register(runtime, "prompt", path)
    ids, types = [1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1]
    fleet = Fleet(base, runtime, {"prompt": (path, "SEQ_CLS", 3)})
    add, runtime.engine.add = runtime.engine.add, lambda seq: add(typed(seq))  # type: ignore

    def typed(seq: Request) -> Request:
        seq.token_type_ids = types if seq.prompt_token_ids == ids else None
        return seq

    mean = PoolingParams("mean")
    pair, single, prompted = fleet.run(
        [("tiny", ids, mean), ("tiny", ids[:3], mean), ("prompt", ids, PoolingParams("SEQ_CLS"))]
    )
    base.set_attn_implementation("eager")
    given, typed_ids = torch.tensor([ids]), torch.tensor([types])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = base(input_ids=given, token_type_ids=typed_ids).last_hidden_state[0].mean(dim=0)
        plain = base(input_ids=given[:, :3]).last_hidden_state[0].mean(dim=0)
        oracle: Any = peft.PeftModel.from_pretrained(tiny.for_task(base, "SEQ_CLS"), path).eval()
        mask = torch.ones_like(given)
        logits = oracle(input_ids=given, attention_mask=mask, token_type_ids=typed_ids).logits[0]
        untyped = oracle(input_ids=given, attention_mask=mask).logits[0]
    torch.testing.assert_close(pair.pooled, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(single.pooled, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prompted.pooled, logits.softmax(-1), atol=1e-4, rtol=1e-4)
    assert float((logits - untyped).abs().max()) > 0.01
    runtime.close()
