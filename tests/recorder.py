"""Drives an engine by hand, and compares what it computed with peft, alone."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor

from server.adapters.manager import Lease
from server.engine.engine import Engine
from server.engine.scheduler import Batch
from server.engine.sequence import SamplingParams, Sequence
from server.runtime import Runtime
from tests.tiny import PeftOracle


class Recorder:
    """Steps an engine that is not started, and keeps the logits of every sampled token."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.engine: Engine = runtime.engine
        self.logits: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.batches: list[Batch] = []
        execute = self.engine.runner.execute

        def recording(batch: Batch) -> Tensor:
            logits = execute(batch)
            sampled = [chunk.seq.key for chunk in batch.chunks if chunk.samples]
            for key, row in zip(sampled, logits, strict=True):
                self.logits[key].append(row.to("cpu", copy=True))
            self.batches.append(batch)
            return logits

        self.engine.runner.execute = recording  # type: ignore[method-assign]

    def add(self, name: str, prompt: list[int], lease: Lease, max_tokens: int = 8) -> Sequence:
        seq = Sequence(
            (name, 0), prompt,
            SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
            adapters=lease.uses, num_virtual_tokens=lease.num_virtual_tokens,
            virtual_kv=lease.virtual_kv, max_len=self.runtime.max_model_len,
        )  # fmt: skip
        self.engine.add(seq)
        return seq

    def load(self, *names: str) -> None:
        """Have adapters resident: what a step holds does not hang on the loader then."""
        cache = self.engine.cache
        for name in names:
            with self.runtime.adapters.lease(name) as lease:
                assert all(cache.prefetch(use.digest) for use in lease.uses)
        while cache.is_loading:
            time.sleep(0.001)
            cache.poll()

    def run(self, num_steps: int = 2000) -> None:
        for _ in range(num_steps):
            if not self.engine.has_work:
                return
            self.engine.step()
            if not self.engine.scheduler.running:
                time.sleep(0.002)  # all wait for adapters that are loading
        raise AssertionError("the engine did not finish")


def compare(recorder: Recorder, seq: Sequence, oracle: PeftOracle) -> float:
    """Teacher-forced logits of peft at every sampled position against the engine's."""
    tokens = [*seq.prompt_token_ids, *seq.output_token_ids]
    expected = oracle.logits(tokens)[len(seq.prompt_token_ids) - 1 : -1]
    actual = torch.stack(recorder.logits[seq.key])
    assert actual.shape == expected.shape
    assert seq.output_token_ids == expected.argmax(-1).tolist(), f"{seq.key}: greedy tokens differ"
    return float((expected - actual).abs().max())
