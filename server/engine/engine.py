"""The engine: sequences in, text out, one step at a time. One thread owns it.

`Engine.step` is the whole loop: take in loaded adapters, schedule, execute, sample, give out.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.upload import upload
from server.adapters.cache import AdapterCache
from server.engine.block_manager import BlockManager
from server.engine.model_runner import ModelRunner
from server.engine.sampler import Sampler
from server.engine.scheduler import Batch, Scheduler
from server.engine.sequence import FinishReason, SampledToken, Sequence
from server.tokenization import Detokenizer, Tokenizer


@dataclass(frozen=True)
class StepOutput:
    """What one step gives to one sequence.

    `token` is None where the sequence ends without a new one; `pooled` is the result of one that
    is pooled, a tensor; `error` says why it failed. `prompt`, beside the first token, has the
    prompt's tokens from the second on, where they were asked for.
    """

    key: tuple[str, int]
    text: str = ""
    token: SampledToken | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    pooled: Any = None
    error: Exception | None = None
    prompt: Seq[SampledToken] = ()


class Engine:
    """Wires scheduler, runner, sampler, adapter cache and detokenizers."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        cache: AdapterCache,
        sampler: Sampler,
        tokenizer: Tokenizer,
        eos_token_ids: Seq[int],
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.cache = cache
        self.sampler = sampler
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._outputs: list[StepOutput] = []  # of the step that is under way
        self._live: dict[tuple[str, int], tuple[Sequence, Detokenizer]] = {}
        #: Prompt positions found in the cache, and prompt positions in all, since the start.
        self.num_prefix_hit_tokens = 0
        self.num_prompt_tokens = 0

    @property
    def blocks(self) -> BlockManager:
        return self.scheduler.blocks

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def live(self) -> list[Sequence]:
        """Every sequence that is waiting or running."""
        return [seq for seq, _ in self._live.values()]

    def add(self, *sequences: Sequence) -> None:
        """Queue sequences; their lengths have been checked."""
        for seq in sequences:
            detokenizer = self._tokenizer.detokenizer(seq.prompt_token_ids, seq.params.stop)
            self._live[seq.key] = (seq, detokenizer)
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """End a request's sequences without output."""
        for key in [key for key in self._live if key[0] == request_id]:
            self._end(self._live[key][0])

    def step(self) -> list[StepOutput]:
        """Run one step; empty where nothing could be scheduled (adapters are loading)."""
        self._outputs = []
        self.cache.poll()
        batch = self.scheduler.schedule()
        outputs = self._outputs = self._give_up(batch)
        if not batch.chunks:
            return outputs
        logits = self.runner.execute(batch)
        if any(chunk.seq.params.prompt_logprobs is not None for chunk in batch.chunks):
            logits = self._score_prompts(batch, logits)
        sampled = [chunk.seq for chunk in batch.chunks if chunk.samples]
        for chunk in batch.chunks:
            if chunk.seq.num_output_tokens == 0 and chunk.completes:
                self.num_prompt_tokens += chunk.seq.prompt_len
                self.num_prefix_hit_tokens += chunk.seq.num_cached
        self.scheduler.computed(batch)
        if sampled:
            tokens = self.sampler.sample(logits, sampled)
            for seq, token in zip(sampled, tokens, strict=True):
                outputs.append(self._advance(seq, token))
        for chunk in batch.chunks:
            if chunk.seq.pooling is not None and chunk.completes:
                outputs.append(self._give_pooled(chunk.seq))
        return outputs

    def _score_prompts(self, batch: Batch, logits: Tensor) -> Tensor:
        """Take in log probabilities of prompts; the logits of the rows that sample are left."""
        sampling = []
        row = 0
        for chunk in batch.chunks:
            seq, end = chunk.seq, row + chunk.num_outputs
            if seq.next_scored is not None:
                # The logits of a position tell of the token after it.
                first = chunk.end - chunk.num_outputs + 1
                targets = seq.token_ids[first : min(chunk.end + 1, seq.prompt_len)]
                seq.prompt_logprobs += self.sampler.score(
                    logits[row : row + len(targets)], targets, seq.params.prompt_logprobs or 0
                )
            row = end
            if chunk.samples:
                sampling.append(row - 1)
        return logits[upload(sampling, torch.long, logits.device)]

    def fail(self, error: Exception) -> list[StepOutput]:
        """A step raised: end everything that was running, so that the next one starts clean.

        What the step had given before it raised is given too: those sequences may have ended.
        """
        outputs, self._outputs = self._outputs, []
        for seq in list(self.scheduler.running):
            outputs.append(StepOutput(seq.key, error=error))
            self._end(seq)
        return outputs

    def _give_up(self, batch: Batch) -> list[StepOutput]:
        outputs = []
        for seq in batch.failed:
            outputs.append(StepOutput(seq.key, error=self.cache.error_of(seq)))
            self._end(seq)
        return outputs

    def _advance(self, seq: Sequence, token: SampledToken | Exception) -> StepOutput:
        """Append a sampled token; decide whether the sequence ends."""
        params, detokenizer = seq.params, self._live[seq.key][1]
        cached = max(0, seq.num_cached - seq.num_virtual_tokens)
        prompt = seq.prompt_logprobs if seq.num_output_tokens == 0 else ()
        if isinstance(token, Exception):
            self._end(seq)
            return StepOutput(seq.key, error=token)
        if params.max_tokens == 0:  # the prompt alone was asked for
            self._end(seq)
            return StepOutput(seq.key, "", None, "length", cached, prompt=prompt)
        seq.token_ids.append(token.token_id)
        num_output = seq.num_output_tokens
        text = ""
        reason: FinishReason | None = None
        # Where a grammar lets the end token come, that is the text's end.
        stops_at_eos = params.grammar is not None or not params.ignore_eos
        is_eos = token.token_id in self._eos and stops_at_eos
        if is_eos or token.token_id in params.stop_token_ids:
            reason = "stop"
        else:
            text = detokenizer.push(token.token_id, may_stop=num_output >= params.min_tokens)
            if detokenizer.stopped:
                reason = "stop"
            elif num_output >= params.max_tokens or len(seq.token_ids) >= seq.max_len:
                reason = "length"
        if reason is not None:
            text += detokenizer.finish()
            self._end(seq)
        return StepOutput(seq.key, text, token, reason, cached, prompt=prompt)

    def _give_pooled(self, seq: Sequence) -> StepOutput:
        self._end(seq)
        return StepOutput(
            seq.key,
            finish_reason="stop",
            num_cached_tokens=max(0, seq.num_cached - seq.num_virtual_tokens),
            pooled=seq.pooled,
        )

    def _end(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.sampler.forget(seq)
        del self._live[seq.key]

    def check_integrity(self) -> None:
        """Raises AssertionError unless every pool agrees with the live sequences."""
        live = self.live
        assert {id(s) for s in live} == {
            id(s) for s in [*self.scheduler.running, *self.scheduler.waiting]
        }, "queues and live sequences differ"
        self.blocks.check_integrity(live)
        self.cache.check_integrity(live)
