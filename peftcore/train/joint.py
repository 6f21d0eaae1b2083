"""Joint training: several adapters of one resident base, trained at once.

    trainer = JointTrainer(model, [Job(adapter_name="a", dataset=rows, learning_rate=1e-3), ...])
    for losses in trainer.train():        # adapter name → loss of this step
        ...
    model.save_pretrained("adapters", selected_adapters=["a"])

A step packs a batch of every running job into one (`packed`), sends it through the base once and
back once, and lets each job's own optimizer update its own adapter. What one job computes does not
depend on which others run: its rows, dropout, gradients, clipping, schedule and data are its own. A
job that ends, by its number of steps, early stopping or an error of its own, leaves the batch; the
others go on. Knows adapters on a model and tokenized samples; nothing of files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftcore.model import PeftModel
from peftcore.train.job import Item, Job, JobError, JobRun, Progress, Status
from peftcore.train.packed import PackedBatch, check_packing, computing, logits_of, pack
from peftcore.tuner import Owner

__all__ = ["Job", "JobError", "JointTrainer", "Progress"]


class JointTrainer:
    """Trains the adapters of `jobs` together.

    Attributes:
        progress: adapter name → what has become of its job; kept when the job has ended.
    """

    def __init__(
        self, model: PeftModel, jobs: Sequence[Job] = (), max_tokens: int | None = None
    ) -> None:
        """Take over the training of adapters that are on `model`.

        Args:
            max_tokens: rows in one pass at most, which bounds the memory; a step that has more is
                computed in several, with the same result. One sample may be longer. None: no bound.

        Raises:
            UnsupportedError: the base does not compute packed sequences as it computes each alone.
            ValueError: as `add`.
        """
        self.model = model
        self.max_tokens = max_tokens
        self.progress: dict[str, Progress] = {}
        self._running: dict[str, JobRun] = {}
        check_packing(model)
        for job in jobs:
            self.add(job)

    @property
    def running(self) -> list[str]:
        """The adapters that are still trained."""
        return list(self._running)

    def add(self, job: Job) -> None:
        """Let a job take part from the next step on.

        Raises:
            ValueError: no such adapter, it is being trained already, or an option or a sample of
                its evaluation is wrong.
        """
        name = job.adapter_name
        self.model._known(name)
        if name in self._running:
            raise ValueError(f"adapter_name: {name!r} is being trained already")
        self.model.set_requires_grad(name)
        progress = Progress()
        self._running[name] = JobRun(self.model, job, progress)
        self.progress[name] = progress
        idle = [name for name in self.model.peft_config if name not in self._running]
        self.model.set_requires_grad(idle, False)

    def train(self) -> Iterator[dict[str, float]]:
        """`step` until no job is left. Whoever stops iterating keeps whole adapters."""
        while self._running:
            yield self.step()
        self.model.eval()

    def step(self) -> dict[str, float]:
        """One batch of every running job, forward and backward, and the updates that are due.

        Returns: adapter name → mean loss over the labelled tokens of its batch. A job that ends in
            this step without one is not in it.
        """
        work: list[Item] = []
        for run in list(self._running.values()):
            with self._guard(run):
                work += run.next_batch()
        if not self.model.training:
            self.model.train()
        losses: dict[str, float] = {}
        for group in _groups(work, self.max_tokens):
            self._forward_backward([i for i in group if i.run.name in self._running], losses)
        for run in list(self._running.values()):
            with self._guard(run):
                run.after_backward(losses[run.name])
        self._evaluate([r for r in self._running.values() if r.evaluation_is_due()])
        for run in list(self._running.values()):
            if run.is_done():
                self._end(run, "finished", "")
        return losses

    def stop(self, adapter_name: str, reason: str = "stopped by the caller") -> None:
        """Take a job out of the training; its adapter is as of its last update."""
        self._end(self._running[adapter_name], "stopped early", reason)

    def _forward_backward(self, items: Sequence[Item], losses: dict[str, float]) -> None:
        """One pass; adds each job's share to `losses`, and its gradients to its parameters."""
        if not items:
            return
        batch = self._pack(items)
        for span in batch.spans:
            self.progress[span.name].num_tokens += len(span)
        runs = [self._running[str(owner.name)] for owner in batch.kept_owners]
        with computing(self.model, batch):
            sums = _sums(logits_of(self.model, batch), batch)
            terms = [
                self._share(run, owner, s)
                for run, owner, s in zip(runs, batch.kept_owners, sums, strict=True)
            ]
            values = torch.stack(terms).tolist()
            finite = [
                term for term, value in zip(terms, values, strict=True) if math.isfinite(value)
            ]
            if finite:
                torch.stack(finite).sum().backward()
        for run, summed, value in zip(runs, torch.stack(sums).tolist(), values, strict=True):
            if math.isfinite(value):
                run.update_loss += value
                losses[run.name] = losses.get(run.name, 0.0) + summed / run.tokens_of_batch
            else:  # ended only now: the backward pass may have computed its rows again
                self._end(run, "failed", f"the loss is {value}")
                losses.pop(run.name, None)

    def _pack(self, items: Sequence[Item]) -> PackedBatch:
        return pack(self.model, [(i.run.name, i.sample) for i in items], [i.draw for i in items])

    def _share(self, run: JobRun, owner: Owner, summed: Tensor) -> Tensor:
        """What a pass adds to the loss of the job's update."""
        name = run.name
        term = self.model.peft_config[name].regularization(self.model._parts[name])
        if term is None:
            return summed / run.tokens_of_update
        # Once an update: each of its passes has the share of its labelled tokens.
        return (summed + term * (owner.end - owner.start)) / run.tokens_of_update

    def _evaluate(self, runs: Sequence[JobRun]) -> None:
        """Measure the losses of the jobs whose turn it is, together."""
        if not runs:
            return
        self.model.eval()
        sums = {run.name: 0.0 for run in runs}
        counts = {run.name: 0 for run in runs}
        work = [Item(run, s, None) for run in runs for s in run.eval_samples]
        limit = self.max_tokens or max(
            1, max(sum(len(s.input_ids) for s in r.eval_samples[: r.job.batch_size]) for r in runs)
        )
        with torch.no_grad():
            for group in _groups(work, limit):
                batch = self._pack(group)
                with computing(self.model, batch):
                    found = _sums(logits_of(self.model, batch), batch)
                for (start, end, name), summed in zip(batch.kept_owners, found, strict=True):
                    sums[str(name)] += float(summed)
                    counts[str(name)] += end - start
        for run in runs:
            if run.is_out_of_patience(sums[run.name] / counts[run.name]):
                reason = f"no lower loss in {run.job.patience} evaluations"
                self._end(run, "stopped early", reason)

    @contextmanager
    def _guard(self, run: JobRun) -> Iterator[None]:
        """Within, an error ends one job instead of the training."""
        try:
            yield
        except Exception as exc:
            reason = str(exc) if isinstance(exc, JobError) else f"{type(exc).__name__}: {exc}"
            self._end(run, "failed", reason)

    def _end(self, run: JobRun, status: Status, reason: str) -> None:
        """Take a job out of the batch; nothing of it is left but its adapter and its progress."""
        run.progress.status, run.progress.reason = status, reason
        run.progress.seconds = time.perf_counter() - run.started
        del self._running[run.name]
        run.drop_gradients()
        run.restore_best()
        self.model.set_requires_grad(run.name, False)


def _sums(logits: Tensor, batch: PackedBatch) -> list[Tensor]:
    """The loss of each owner of kept rows, summed over its labelled tokens."""
    losses = cross_entropy(logits, batch.targets, reduction="none")
    return [part.sum() for part in losses.split([o.end - o.start for o in batch.kept_owners])]


def _groups(work: Sequence[Item], max_tokens: int | None) -> Iterator[list[Item]]:
    """`work` in order, in runs of at most `max_tokens` tokens; at least one sample each."""
    group: list[Item] = []
    size = 0
    for item in work:
        length = len(item.sample.input_ids)
        if group and max_tokens is not None and size + length > max_tokens:
            yield group
            group, size = [], 0
        group.append(item)
        size += length
    if group:
        yield group


if __name__ == "__main__":
    from peftcore.train.joint_cli import main

    main()
