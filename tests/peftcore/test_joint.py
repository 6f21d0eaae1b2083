"""Joint training against HF peft, which trains each adapter alone: same base, start and data."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    get_scheduler,
)

from peftcore import (
    AdapterConfig,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peftcore.quant import quantize_model
from peftcore.train import joint
from peftcore.train.job import JobRun
from peftcore.train.joint import Job, JointTrainer, Progress
from tests import tiny
from tests.peftcore.worlds import quiet

STEPS = 20


def rows_of(seed: int, count: int = 8) -> list[dict[str, Tensor]]:
    """Samples of several lengths, the first few labels of each ignored, and one in the middle."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 18, (1,), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, 4, (1,), generator=generator))] = -100
        labels[4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(r["input_ids"]) for r in rows], batch_first=True)
    labels = pad([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    ids = pad([r["input_ids"] for r in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "task_ids" in rows[0]:
        batch["task_ids"] = torch.tensor([r["task_ids"] for r in rows])
    return batch


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def alone(model: Any, job: Job, rows: Sequence[dict[str, Any]]) -> list[float]:
    """The plain loop: the mean loss over each update's labelled tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=job.weight_decay)
    steps = job.num_updates()
    scheduler = get_scheduler(job.lr_scheduler, optimizer, job.warmup_steps, steps)
    size = job.batch_size * job.gradient_accumulation
    losses = []
    model.train()
    while len(losses) < steps:
        for i in range(0, len(rows), size):
            outputs = model(**padded(rows[i : i + size]))  # peft's own mean is over all its tokens
            outputs.loss.backward()
            if job.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
            if len(losses) == steps:
                break
    model.eval()
    return losses


@dataclass
class World:
    """Every method of peft's on one base, trained jointly by us."""

    base: PreTrainedModel
    configs: dict[str, peft.PeftConfig]
    jobs: dict[str, Job]
    rows: dict[str, list[dict[str, Any]]]
    model: PeftModel
    progress: dict[str, Progress] = field(default_factory=dict)

    @classmethod
    def make(cls, base: PreTrainedModel, configs: dict[str, peft.PeftConfig]) -> World:
        rows: dict[str, list[dict[str, Any]]] = {n: rows_of(i) for i, n in enumerate(configs)}
        for name, config in configs.items():
            if config.peft_type == "MULTITASK_PROMPT_TUNING":
                for i, row in enumerate(rows[name]):
                    row["task_ids"] = i % config.num_tasks
        jobs = {
            name: Job(
                adapter_name=name, dataset=rows[name], max_steps=STEPS,
                batch_size=1 + i % 3, gradient_accumulation=1 + i % 2,
                learning_rate=3e-3 * (1 + i % 2), lr_scheduler=["linear", "cosine"][i % 2],
                warmup_steps=i % 4,
            )
            for i, name in enumerate(configs)
        }  # fmt: skip
        model = adapted(base, {n: tiny.our_config(c) for n, c in configs.items()})
        trainer = JointTrainer(model, list(jobs.values()))
        for _ in trainer.train():
            pass
        return cls(base, configs, jobs, rows, model, trainer.progress)

    def alone(self, name: str) -> tuple[list[float], Any]:
        with quiet():
            torch.manual_seed(3)
            theirs = peft.get_peft_model(
                copy.deepcopy(self.base), copy.deepcopy(self.configs[name])
            )
            losses = alone(theirs, self.jobs[name], self.rows[name])
        return losses, theirs


def adapted(base: PreTrainedModel, configs: dict[str, AdapterConfig]) -> PeftModel:
    """A copy of the base with adapters, each started from the same seed as if it were alone."""
    model: PeftModel | None = None
    for name, config in configs.items():
        torch.manual_seed(3)
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model


#: Scheduled in training by calls of one's own.
NOT_PLAIN = {"ADALORA"}


def drops(config: peft.PeftConfig) -> bool:
    """Has it dropout? peft draws from one global stream: that is compared otherwise."""
    return any(value for key, value in vars(config).items() if key.endswith("dropout"))


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "gpt2": lambda: without_dropout(tiny.gpt2()),
    "gemma3": tiny.gemma3,
}
TYPES = {"llama": "llama", "gpt2": "gpt2", "gemma3": "gemma3_text"}


#: What acts on the rows of the head, which are fewer, and on those of the embedding.
HEADS: dict[str, dict[str, Any]] = {
    "lora-and-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora-and-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "lora-on-head": {"target_modules": ["lm_head", "q_proj"]},
    "lora-on-embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


def configs_of(base: str) -> dict[str, peft.PeftConfig]:
    configs = {
        name: config
        for name, config in tiny.peft_configs(TYPES[base]).items()
        if config.peft_type not in NOT_PLAIN and not drops(config)
    }
    if base == "llama":  # elsewhere the head is tied
        for name, options in HEADS.items():
            configs[name] = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    return configs


_worlds: dict[str, World] = {}


def world(base: str) -> World:
    if base not in _worlds:
        _worlds[base] = World.make(MAKERS[base](), configs_of(base))
    return _worlds[base]


@pytest.mark.parametrize(("base", "method"), [(b, m) for b in MAKERS for m in configs_of(b)])
def test_jointly_is_what_peft_computes_alone(base: str, method: str, tmp_path: Path) -> None:
    both = world(base)
    expected, theirs = both.alone(method)
    progress = both.progress[method]
    assert progress.status == "finished", progress.reason
    assert progress.losses == pytest.approx(expected, abs=1e-4)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        both.model.save_pretrained(tmp_path / "ours", selected_adapters=[method])
    wanted = load_file(tmp_path / "theirs" / tiny.WEIGHTS_NAME)
    got = load_file(tmp_path / "ours" / method / tiny.WEIGHTS_NAME)
    for key, tensor in got.items():
        if base == "gpt2" and "c_attn" in key and key.endswith("bias"):
            # Keys' biases have no effect under softmax: their gradients are rounding errors.
            tensor[64:128] = wanted[key][64:128]
        torch.testing.assert_close(tensor, wanted[key], atol=2e-3, rtol=1e-3, msg=key)


# -- one job does not depend on another ------------------------------------------------------------

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
DROPPED = dataclasses.replace(LORA, lora_dropout=0.3)


def job(name: str, data_seed: int = 0, **options: Any) -> Job:
    options = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 6} | options
    return Job(adapter_name=name, dataset=options.pop("dataset", rows_of(data_seed)), **options)


def trainer_of(
    configs: dict[str, AdapterConfig],
    jobs: Sequence[Job],
    base: PreTrainedModel | None = None,
    **options: Any,
) -> JointTrainer:
    return JointTrainer(adapted(base or tiny.llama(), configs), jobs, **options)


def run(trainer: JointTrainer) -> JointTrainer:
    for _ in trainer.train():
        pass
    return trainer


def state(trainer: JointTrainer, name: str) -> dict[str, Tensor]:
    return {
        k: v.detach().clone()
        for k, v in get_peft_model_state_dict(trainer.model, None, name).items()
    }


def assert_same(one: JointTrainer, other: JointTrainer, name: str, **tolerance: float) -> None:
    assert one.progress[name].losses == pytest.approx(other.progress[name].losses, abs=1e-5)
    for key, value in state(one, name).items():
        torch.testing.assert_close(
            value, state(other, name)[key], **({"atol": 1e-4, "rtol": 1e-4} | tolerance), msg=key
        )


@pytest.mark.parametrize("factor", [1e8, math.inf])
def test_another_jobs_huge_loss_changes_no_gradient(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads: list[dict[str, Tensor]] = [{}, {}]
    sums = joint._sums
    for found, scale in zip(grads, (1.0, factor), strict=True):
        monkeypatch.setattr(
            joint, "_sums", lambda *args, scale=scale: [(s := sums(*args))[0], s[1] * scale]
        )
        trainer = trainer_of({"a": LORA, "b": LORA}, [job("a"), job("b", 1)])
        for key, parameter in trainer.model.named_parameters():
            if ".parts.a." in key:
                parameter.register_hook(
                    lambda g, key=key, found=found: found.__setitem__(key, g.clone())
                )
        trainer.step()
        assert trainer.progress["b"].status == ("running" if math.isfinite(scale) else "failed")
    assert grads[0]
    assert all(torch.equal(grads[1][key], value) for key, value in grads[0].items())


def test_jobs_of_different_lengths_leave_when_they_end() -> None:
    jobs = [
        job("a", max_steps=2, weight_decay=0.1, lr_scheduler="constant"),
        job("b", 1, max_steps=5, gradient_accumulation=2, lr_scheduler="cosine"),
        job("c", 2, max_steps=None, num_epochs=2, batch_size=3, optimizer="sgd"),
    ]
    trainer = trainer_of(dict.fromkeys("abc", LORA), jobs)
    steps = list(trainer.train())
    assert [sorted(s) for s in steps] == [list("abc")] * 2 + [list("bc")] * 4 + [["b"]] * 4
    assert {n: p.num_updates for n, p in trainer.progress.items()} == {"a": 2, "b": 5, "c": 6}
    assert all(p.status == "finished" for p in trainer.progress.values())
    assert trainer.running == []
    for one in jobs:
        assert_same(trainer, run(trainer_of({one.adapter_name: LORA}, [one])), one.adapter_name)


def test_an_adapter_without_samples_is_not_touched() -> None:
    """Neither by weight decay nor by momentum, whether its job has ended or it never had one."""
    jobs = [job("a", max_steps=1, weight_decay=0.5), job("b", 1, weight_decay=0.5)]
    trainer = trainer_of(dict.fromkeys("abc", LORA), jobs)
    idle = state(trainer, "c")
    trainer.step()
    ended = state(trainer, "a")
    run(trainer)
    for name, before in (("a", ended), ("c", idle)):
        assert all(torch.equal(value, before[key]) for key, value in state(trainer, name).items())
        parts = trainer.model.named_parameters()
        assert all(p.grad is None and not p.requires_grad for k, p in parts if f".{name}." in k)


def test_a_job_may_join_later() -> None:
    trainer = trainer_of({"a": LORA, "b": LORA}, [job("a")])
    trainer.step()
    trainer.add(job("b", 1))
    with pytest.raises(ValueError, match="'b' is being trained"):
        trainer.add(job("b", 1))
    run(trainer)
    assert_same(trainer, run(trainer_of({"b": LORA}, [job("b", 1)])), "b")
    trainer.add(job("b", 1))  # again, from where it is
    run(trainer)
    assert trainer.progress["b"].status == "finished"


@pytest.mark.parametrize("limit", [1, 25, 40])
def test_passes_of_bounded_size_give_the_same(limit: int) -> None:
    configs = {
        "a": DROPPED,
        "b": LORA,
        "c": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    jobs = [job(name, i, batch_size=3) for i, name in enumerate(configs)]
    whole = run(trainer_of(configs, jobs))
    for name in configs:
        assert_same(run(trainer_of(configs, jobs, max_tokens=limit)), whole, name)


# -- errors of one job -----------------------------------------------------------------------------


def spoiled(kind: str) -> tuple[Job, str]:
    """A job that fails at its third step, and what is said of it."""
    rows: list[dict[str, Any]] = rows_of(1)[:4]
    bad: dict[str, Any] = {
        "no-labels": {"input_ids": [1, 2]},
        "lengths": {"input_ids": [1, 2], "labels": [1]},
        "ids": {"input_ids": [1, tiny.VOCAB], "labels": [1, 2]},
        "nothing": {"input_ids": [1, 2], "labels": [-100, -100]},
    }
    says = {
        "no-labels": "no labels", "lengths": "one length", "ids": "none of the model's",
        "nothing": "no token of a batch has a label",
    }  # fmt: skip
    return job("b", dataset=[*rows, bad[kind], bad[kind]]), says[kind]


@pytest.mark.parametrize("kind", ["no-labels", "lengths", "ids", "nothing"])
def test_bad_data_stop_their_own_job(kind: str) -> None:
    bad, says = spoiled(kind)
    trainer = run(trainer_of({"a": LORA, "b": LORA}, [job("a"), bad]))
    progress = trainer.progress["b"]
    assert (progress.status, progress.num_updates) == ("failed", 2)
    assert says in progress.reason
    assert_same(trainer, run(trainer_of({"a": LORA}, [job("a")])), "a")


@pytest.mark.parametrize("at", ["loss", "gradient", "optimizer", "data"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_job_that_fails_is_stopped_alone(at: str, checkpointing: bool) -> None:
    def data() -> Any:
        yield from rows_of(1)[:4]
        raise OSError("the disk is gone")

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no more")

    options: dict[str, Any] = {}
    if at == "data":
        options["dataset"] = data()
    if at == "optimizer":
        options["optimizer"] = lambda named, lr, decay: Fails([p for _, p in named], lr)
    base = tiny.llama()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    trainer = trainer_of({"a": LORA, "b": LORA}, [job("a"), job("b", 1, **options)], base)
    trainer.step()
    named = trainer.model.named_parameters()
    parameter = next(p for key, p in named if ".down_proj.parts.b.lora_B" in key)
    if at == "loss":
        parameter.data[0] = math.nan
    if at == "gradient":
        parameter.register_hook(lambda g: g * math.inf)
    before = parameter.detach().clone()
    run(trainer)
    progress = trainer.progress["b"]
    assert progress.status == "failed"
    says = {
        "loss": "the loss is nan", "gradient": "the norm of the gradients is",
        "data": "disk is gone", "optimizer": "RuntimeError: no more",
    }  # fmt: skip
    assert says[at] in progress.reason
    assert torch.equal(parameter.nan_to_num(), before.nan_to_num()) or at == "data"
    assert_same(trainer, run(trainer_of({"a": LORA}, [job("a")])), "a")


def test_early_stopping_counts_evaluations_without_progress() -> None:
    held_out = rows_of(7, 3)
    stops = job(
        "b", 1, max_steps=50, eval_dataset=held_out, eval_steps=2, patience=2, min_improvement=9.0
    )  # fmt: skip
    watched = job("a", eval_dataset=held_out, eval_steps=3)
    trainer = trainer_of({"a": LORA, "b": LORA}, [watched, stops])
    run(trainer)
    assert trainer.progress["b"].status == "stopped early"
    assert [n for n, _ in trainer.progress["b"].eval_losses] == [2, 4, 6]  # the first is the lowest
    assert trainer.progress["b"].num_updates == 6
    assert [n for n, _ in trainer.progress["a"].eval_losses] == [3, 6]
    trainer.model.set_adapter("a")
    batch = padded(held_out)
    with torch.no_grad():
        expected = float(trainer.model.eval()(**batch).loss)
    assert trainer.progress["a"].eval_losses[-1][1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_epochs": 1}, "num_epochs"),
        ({"patience": 1}, "patience"),
        ({"shuffle": True, "dataset": iter([])}, "shuffle"),
        ({"max_steps": None, "dataset": iter([])}, "max_steps"),
        ({"optimizer": "adafactor"}, "optimizer"),
        ({"eval_dataset": []}, "eval_dataset"),
        ({"eval_dataset": [{"input_ids": [1]}]}, "labels"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of({"a": LORA}, [job("a", **options)])
    with pytest.raises(ValueError, match="no adapter 'z'"):
        trainer_of({"a": LORA}, [job("z")])


# -- dropout and order -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "p-tuning-lstm"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_dropout_is_that_of_the_job_alone(
    method: str, make: Callable[[], PreTrainedModel], checkpointing: bool
) -> None:
    """The adapters' own, and in GPT-2 the base's too, in attention and outside it."""
    base = make()
    targets = tiny.ATTENTION[base.config.model_type]
    lora = LoraConfig(r=4, target_modules=targets, lora_dropout=0.3, task_type="CAUSAL_LM")
    dropped: dict[str, AdapterConfig] = {
        "lora": lora,
        "dora": dataclasses.replace(lora, use_dora=True),
        "p-tuning-lstm": PromptEncoderConfig(
            num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=16,
            encoder_dropout=0.3, task_type="CAUSAL_LM",
        ),
    }  # fmt: skip
    configs = {"a": dropped[method], "b": dataclasses.replace(lora, lora_dropout=0.0)}
    jobs = [job("b", 1, max_steps=3), job("a", max_steps=3)]
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(11)
    trainer = run(trainer_of(configs, jobs, base))
    torch.manual_seed(12)
    assert_same(trainer, run(trainer_of({"a": configs["a"]}, jobs[1:], make())), "a")
    other = run(trainer_of(configs, [dataclasses.replace(jobs[1], seed=1)], make()))
    assert other.progress["a"].losses != pytest.approx(trainer.progress["a"].losses, abs=1e-4)
    assert not any(
        "forward" in vars(m) for m in trainer.model.modules() if isinstance(m, nn.Dropout)
    )


def test_shuffling_is_the_seeds_and_reaches_every_sample_each_epoch() -> None:
    seen: list[list[int]] = []
    for seed in (0, 0, 1):
        rows = [{"input_ids": [i, 1], "labels": [i, 1]} for i in range(7)]
        shuffled = job("a", dataset=rows, max_steps=None, num_epochs=2, shuffle=True, seed=seed)
        trainer = trainer_of({"a": LORA}, [])
        run_ = JobRun(trainer.model, shuffled, Progress())
        seen.append([int(i.sample.input_ids[0]) for _ in range(8) for i in run_.next_batch()])
    assert seen[0] == seen[1] != seen[2]
    assert sorted(seen[0][:7]) == sorted(seen[0][7:]) == list(range(7))
    assert seen[0][:7] != seen[0][7:]


# -- bases -----------------------------------------------------------------------------------------


def quantized() -> PreTrainedModel:
    model = tiny.llama(intermediate_size=128)
    quantize_model(model, "nf4")
    return model


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_over_our_quantized_base(max_tokens: int | None) -> None:
    """As each adapter is trained alone by a plain loop on the same base."""
    configs = {
        name: tiny.our_config(config)
        for name, config in tiny.peft_configs("llama").items()
        if name in ("lora-r8-all", "dora", "ia3", "prefix", "prompt")
    }
    jobs = [job(name, i, lr_scheduler="constant") for i, name in enumerate(configs)]
    trainer = run(trainer_of(configs, jobs, quantized(), max_tokens=max_tokens))
    for one in jobs:
        name = one.adapter_name
        model = adapted(quantized(), {name: configs[name]})
        expected = alone(model, one, one.dataset)  # type: ignore[arg-type]
        assert trainer.progress[name].losses == pytest.approx(expected, abs=1e-4)


def test_over_bitsandbytes_four_bits(tmp_path: Path) -> None:
    tiny.llama(intermediate_size=128).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def load() -> PreTrainedModel:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits)

    theirs = {
        "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    jobs = [job(name, i) for i, name in enumerate(theirs)]
    configs = {name: tiny.our_config(config) for name, config in theirs.items()}
    model: PeftModel | None = None
    for name, config in configs.items():
        torch.manual_seed(3)
        if model is None:
            model = get_peft_model(load(), config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    trainer = run(JointTrainer(model, jobs))
    for one in jobs:
        with quiet():
            torch.manual_seed(3)
            reference = peft.get_peft_model(load(), theirs[one.adapter_name])
            expected = alone(reference, one, one.dataset)  # type: ignore[arg-type]
        assert trainer.progress[one.adapter_name].losses == pytest.approx(expected, abs=1e-4)
