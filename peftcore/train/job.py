"""A job of joint training: what one adapter is told, and its course: data, optimizer, schedule.

What a job does depends on nothing but itself. Knows one adapter on a model and tokenized samples;
nothing of other jobs, of batches or of files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_scheduler

from peftcore.methods.adalora import RankAllocator
from peftcore.methods.prompt_tuning import MultitaskPrompt
from peftcore.model import PeftModel
from peftcore.ops.optimizer import clip_norm_
from peftcore.parts import ModulePart
from peftcore.train.adamw import AdamW
from peftcore.train.dropout import Draw, has_dropout
from peftcore.train.packed import Sample
from peftcore.train.samples import IGNORED

#: Makes an optimizer of (name, parameter) pairs, a learning rate and a weight decay.
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]], float, float], Optimizer]

Status = Literal["running", "finished", "stopped early", "failed"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """How one adapter is trained: what it would be told if it were trained alone.

    Attributes:
        adapter_name: of an adapter on the model.
        dataset: samples, mappings with `input_ids` and `labels` (-100: not in the loss) of one
            length, and `task_ids` under a multitask prompt. A sequence is iterated anew each epoch.
        batch_size: samples a step.
        gradient_accumulation: steps an update; the loss is the mean over all tokens of the update.
        optimizer: "adamw", "sgd", or what makes one.
        weight_decay: not of biases and norms, as in transformers' Trainer.
        lr_scheduler: one of transformers' names, over the job's own updates.
        max_steps: updates until the end. num_epochs: instead of it; 1 where neither is given.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        eval_dataset, eval_steps: samples whose loss is measured every so many updates.
        patience: the job stops after so many evaluations in a row without a loss that is lower, by
            more than `min_improvement`, than the lowest before.
        keep_best: the adapter ends as it was at the evaluation with the lowest loss.
        shuffle: a new order each epoch; for a dataset that is a sequence.
        seed: decides order and dropout.
    """

    adapter_name: str
    dataset: Iterable[Mapping[str, Any]]
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    optimizer: str | OptimizerFactory = "adamw"
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    warmup_steps: int = 0
    max_steps: int | None = None
    num_epochs: int | None = None
    max_grad_norm: float | None = 1.0
    eval_dataset: Sequence[Mapping[str, Any]] | None = None
    eval_steps: int | None = None
    patience: int | None = None
    min_improvement: float = 0.0
    keep_best: bool = False
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "gradient_accumulation", "max_steps", "num_epochs", "eval_steps",
            "patience", "max_grad_norm",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} of job {self.adapter_name!r} is not positive")
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError(f"num_epochs: job {self.adapter_name!r} has max_steps too")
        if self.eval_dataset is None or self.eval_steps is None:
            for name in ("patience", "keep_best", "eval_steps"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}: job {self.adapter_name!r} has no eval_dataset and eval_steps"
                    )
        if not isinstance(self.dataset, Sequence):
            if self.shuffle:
                raise ValueError(f"shuffle: the data of job {self.adapter_name!r} are no sequence")
            if self.max_steps is None:
                raise ValueError(
                    f"max_steps: required for job {self.adapter_name!r}, whose data have no length"
                )

    def num_updates(self) -> int:
        """How many updates the job makes if nothing stops it."""
        if self.max_steps is not None:
            return self.max_steps
        assert isinstance(self.dataset, Sequence)
        batches = math.ceil(len(self.dataset) / self.batch_size)
        return (self.num_epochs or 1) * math.ceil(batches / self.gradient_accumulation)


@dataclass
class Progress:
    """What has become of a job.

    Attributes:
        status: "running", "finished", "stopped early" or "failed"; reason: why, in words.
        num_updates: optimizer steps done.
        num_tokens: rows computed for it, virtual tokens included.
        losses: of each update, nats a labelled token.
        learning_rates: of each update.
        eval_losses: (updates done, loss).
        num_parameters: trained values.
        seconds: wall time between joining the training and leaving it.
    """

    status: Status = "running"
    reason: str = ""
    num_updates: int = 0
    num_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    num_parameters: int = 0
    seconds: float = 0.0


class JobError(ValueError):
    """What is wrong with one job alone."""


@dataclass(frozen=True)
class Item:
    """A sample of a job in a step."""

    run: JobRun
    sample: Sample
    draw: Draw | None


class JobRun:
    """A job under way: its data, its optimizer, its schedule.

    Attributes:
        tokens_of_update, tokens_of_batch: labelled tokens of the update, and of the batch, that is
            being computed.
        update_loss: of the batches of the update so far.
    """

    def __init__(self, model: PeftModel, job: Job, progress: Progress) -> None:
        self.name, self.job, self.progress = job.adapter_name, job, progress
        self._vocab = model.get_base_model().config.get_text_config().vocab_size
        self._shared = model._parts[self.name].shared
        prompt = model._parts[self.name].prompt
        self._first_label = 0 if prompt is not None and not prompt.is_kv else 1
        self._num_tasks = (
            len(prompt.prefix_task_cols) if isinstance(prompt, MultitaskPrompt) else None
        )
        self._drops = has_dropout(model, self.name)
        self._parameters = parameters_of(model, self.name)
        progress.num_parameters = sum(p.numel() for _, p in self._parameters)
        self.started = time.perf_counter()
        self._optimizer = make_optimizer(job, self._parameters)
        self._total = job.num_updates()
        self._scheduler = get_scheduler(
            job.lr_scheduler, self._optimizer, job.warmup_steps, self._total
        )
        self._batches = self._epochs()
        self._pending: list[list[Sample]] = []
        self._num_batches = 0
        self._lowest, self._worse = math.inf, 0
        self._best: list[Tensor] = []
        self.tokens_of_update = self.tokens_of_batch = 0
        self.update_loss = 0.0
        self.eval_samples = [self._sample(s) for s in job.eval_dataset or ()]
        if job.eval_dataset is not None and not self._num_labels(self.eval_samples):
            raise JobError(f"eval_dataset: of job {self.name!r} has no labelled token")

    def _epochs(self) -> Iterator[list[list[Sample]]]:
        """The batches of one update after another; an update does not reach into the next epoch."""
        job = self.job
        generator = torch.Generator().manual_seed(job.seed)
        while True:
            rows: Iterable[Mapping[str, Any]] = job.dataset
            if job.shuffle:
                assert isinstance(job.dataset, Sequence)
                order = torch.randperm(len(job.dataset), generator=generator).tolist()
                rows = (job.dataset[i] for i in order)
            update: list[list[Sample]] = []
            batch: list[Sample] = []
            empty = True
            for row in rows:
                empty = False
                batch.append(self._sample(row))
                if len(batch) == job.batch_size:
                    update.append(batch)
                    batch = []
                if len(update) == job.gradient_accumulation:
                    yield update
                    update = []
            if batch:
                update.append(batch)
            if update:
                yield update
            if empty:
                raise JobError("the data ended before max_steps")

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        ids, labels = _ids(row, "input_ids"), _ids(row, "labels")
        if ids.shape != labels.shape or ids.dim() != 1 or not len(ids):
            raise JobError(
                f"input_ids {list(ids.shape)} and labels {list(labels.shape)} of a sample are not "
                "of one length"
            )
        if int(ids.min()) < 0 or int(max(ids.max(), labels.max())) >= self._vocab:
            raise JobError(f"a token id of a sample is none of the model's {self._vocab}")
        if self._num_tasks is None:
            return Sample(ids, labels)
        if not 0 <= int(row.get("task_ids", -1)) < self._num_tasks:
            raise JobError(
                f"task_ids of a sample: one of the prompt's {self._num_tasks} tasks is required"
            )
        return Sample(ids, labels, int(row["task_ids"]))

    def next_batch(self) -> list[Item]:
        """The samples of the next step."""
        if not self._pending:
            self._pending = list(next(self._batches))
            self.tokens_of_update = sum(map(self._num_labels, self._pending))
            self.update_loss = 0.0
            if not self.tokens_of_update:
                raise JobError("no token of a batch has a label")
        batch = self._pending.pop(0)
        self.tokens_of_batch = max(1, self._num_labels(batch))
        number = self._num_batches
        self._num_batches += 1
        if not self._drops:
            return [Item(self, sample, None) for sample in batch]
        return [
            Item(self, sample, Draw.of(self.job.seed, number, i)) for i, sample in enumerate(batch)
        ]

    def _num_labels(self, batch: Sequence[Sample]) -> int:
        """Labels that a position predicts; the first token's only where virtual tokens precede."""
        return sum(int((s.labels[self._first_label :] != IGNORED).sum()) for s in batch)

    def after_backward(self, loss: float) -> None:
        """Update the adapter where the last batch of an update has been computed."""
        if self._pending:
            return
        gradients = [grad for _, p in self._parameters if (grad := p.grad) is not None]
        limit = math.inf if self.job.max_grad_norm is None else self.job.max_grad_norm
        norm = clip_norm_(gradients, limit)
        if not math.isfinite(norm):
            raise JobError(f"the norm of the gradients is {norm}")
        self.progress.losses.append(self.update_loss)
        self.progress.learning_rates.append(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        if isinstance(self._shared, RankAllocator):
            self._shared.update_and_allocate(self.progress.num_updates)
        self.progress.num_updates += 1
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for _, parameter in self._parameters:
            parameter.grad = None

    def evaluation_is_due(self) -> bool:
        done, every = self.progress.num_updates, self.job.eval_steps
        last = self.progress.eval_losses[-1][0] if self.progress.eval_losses else 0
        return bool(every and self.eval_samples and done > last and done % every == 0)

    def is_out_of_patience(self, loss: float) -> bool:
        """Take note of an evaluation."""
        self.progress.eval_losses.append((self.progress.num_updates, loss))
        if loss < self._lowest - self.job.min_improvement:
            self._lowest, self._worse = loss, 0
            if self.job.keep_best:
                self._best = [p.detach().clone() for _, p in self._parameters]
        else:
            self._worse += 1
        return self.job.patience is not None and self._worse >= self.job.patience

    @torch.no_grad()
    def restore_best(self) -> None:
        """Let the adapter be what it was at its best evaluation, if that is kept."""
        for (_, parameter), best in zip(self._parameters, self._best, strict=False):
            parameter.copy_(best)

    def is_done(self) -> bool:
        return self.progress.num_updates >= self._total


def _ids(row: Mapping[str, Any], key: str) -> Tensor:
    if key not in row:
        raise JobError(f"a sample has no {key} (it has {', '.join(row)})")
    return torch.as_tensor(row[key], dtype=torch.int64).cpu()


def parameters_of(model: PeftModel, name: str) -> list[tuple[str, nn.Parameter]]:
    """What of the adapter is trained, each once, by a name for messages and weight decay."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for part in model._parts[name].all():
        prefix = f"{part.module.path}." if isinstance(part, ModulePart) else ""
        for key, parameter in part.named_parameters():
            if parameter.requires_grad:
                found.setdefault(id(parameter), (prefix + key, parameter))
    return list(found.values())


def make_optimizer(job: Job, parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
    if callable(job.optimizer):
        return job.optimizer(parameters, job.learning_rate, job.weight_decay)
    decayed = [p for name, p in parameters if not _spared(name)]
    spared = [p for name, p in parameters if _spared(name)]
    groups = [
        {"params": ps, "weight_decay": decay}
        for ps, decay in ((decayed, job.weight_decay), (spared, 0.0))
        if ps
    ]
    if job.optimizer == "adamw":
        return AdamW(groups, lr=job.learning_rate)
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=job.learning_rate)
    raise ValueError(
        f"optimizer: {job.optimizer!r} of job {job.adapter_name!r} is not adamw or sgd"
    )


def _spared(name: str) -> bool:
    """Does weight decay spare it? transformers' Trainer goes by these words."""
    return any(word in name.lower() for word in ("bias", "layernorm", "rmsnorm", "_norm", "ln_"))
