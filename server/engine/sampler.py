"""From logits to tokens, per row by its own request's parameters and random numbers.

Logits are changed in this order: bias; repetition, frequency and presence penalties; tokens that a
grammar forbids; tokens that must not come yet; temperature; top_k; top_p; min_p. A row's draw
depends on its seed, not on the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.guided import Guides
from server.engine.sequence import SampledToken, SamplingParams, Sequence, TokenLogprob
from server.errors import ServerError

#: Rows of a prompt whose logits are in float32 at once.
_SCORED_ROWS = 32
#: Likeliest tokens among which top_k and top_p are looked for, before all are sorted.
_NUM_CANDIDATES = 1024


class Sampler:
    """Draws the next token of each sequence.

    Args:
        eos_token_ids: tokens that end a sequence, banned before `min_tokens`.
    """

    def __init__(self, eos_token_ids: Seq[int]) -> None:
        self._eos = list(eos_token_ids)
        self._generators: dict[tuple[str, int], torch.Generator] = {}
        self._guides = Guides()

    def forget(self, seq: Sequence) -> None:
        """Drop the sequence's random state and its place in its grammar."""
        self._generators.pop(seq.key, None)
        self._guides.forget(seq)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> Seq[SampledToken | ServerError]:
        """One token a row, or why it cannot have one.

        Args:
            logits: `[rows, vocab]`, one row for each of `sequences`.
        """
        logits = logits.float()
        raw = logits
        if any(self._changes(seq) for seq in sequences):
            logits = logits.clone()
            for row, seq in zip(logits, sequences, strict=True):
                self._change(row, seq)
        guided = [i for i, seq in enumerate(sequences) if seq.params.grammar is not None]
        failed: dict[int, ServerError] = {}
        if guided:
            logits = logits.clone() if logits is raw else logits
            failed = self._guides.mask(logits, sequences, guided)
            for i in guided:
                self._ban_stops(logits[i], sequences[i])
        tokens = logits.argmax(dim=-1)
        drawn = [i for i, seq in enumerate(sequences) if seq.params.temperature > 0]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            tokens[rows] = self._draw(logits[rows], [sequences[i] for i in drawn])
        token_ids: list[int] = tokens.tolist()
        sampled = self._with_logprobs(raw, token_ids, sequences)
        if not guided:
            return sampled
        failed |= self._guides.accept(sequences, token_ids, [i for i in guided if i not in failed])
        return [failed.get(i, token) for i, token in enumerate(sampled)]

    @staticmethod
    def score(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[SampledToken]:
        """The tokens of a prompt with their log probabilities.

        Args:
            logits: `[rows, vocab]`, any float type; row i is what the model expected of token i.
        """
        scored = []
        for start in range(0, len(token_ids), _SCORED_ROWS):
            targets = token_ids[start : start + _SCORED_ROWS]
            rows = logits[start : start + len(targets)].float()
            log_total = rows.logsumexp(dim=-1)
            own = rows[range(len(targets)), targets] - log_total
            values, ids = rows.topk(num_top, dim=-1)
            values -= log_total[:, None]
            for token, logprob, top_ids, top in zip(
                targets, own.tolist(), ids.tolist(), values.tolist(), strict=True
            ):
                likeliest = [TokenLogprob(t, v) for t, v in zip(top_ids, top, strict=True)]
                scored.append(SampledToken(token, logprob, likeliest))
        return scored

    def _changes(self, seq: Sequence) -> bool:
        p = seq.params
        return bool(
            p.repetition_penalty != 1
            or p.presence_penalty
            or p.frequency_penalty
            or p.logit_bias
            or seq.num_output_tokens < p.min_tokens
        )

    def _change(self, logits: Tensor, seq: Sequence) -> None:
        """Bias, penalties and bans on one row `[vocab]`, in place."""
        p = seq.params
        if p.logit_bias:
            biased = [token_id for token_id, _ in p.logit_bias]
            logits[biased] += torch.tensor([b for _, b in p.logit_bias], device=logits.device)
        output = seq.output_token_ids
        if p.repetition_penalty != 1:
            seen = torch.tensor(
                sorted({*seq.prompt_token_ids, *output}), device=logits.device, dtype=torch.long
            )
            values = logits[seen]
            penalty = p.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if output and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(output, device=logits.device, dtype=torch.long)
            seen, counts = torch.unique(ids, return_counts=True)
            logits[seen] -= p.frequency_penalty * counts + p.presence_penalty
        if p.grammar is None:
            self._ban_stops(logits, seq)

    def _ban_stops(self, logits: Tensor, seq: Sequence) -> None:
        """No end before `min_tokens`, in one row `[vocab]`; a grammar's end comes all the same."""
        if seq.num_output_tokens >= seq.params.min_tokens:
            return
        stops = [*self._eos, *seq.params.stop_token_ids]
        kept = logits[stops]
        logits[stops] = -torch.inf
        if seq.params.grammar is not None and not bool((logits > -torch.inf).any()):
            logits[stops] = kept

    def _draw(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        """Sampled tokens `[rows]`: where a uniform number falls among the summed probabilities."""
        probs = probabilities(logits, [seq.params for seq in sequences])
        sums = probs.cumsum(dim=-1, dtype=torch.double)
        total = sums[:, -1:]
        drawn = torch.cat([self._uniform(seq, probs.device) for seq in sequences])[:, None]
        # Rounded up to the total it would fall behind the last token.
        places = torch.minimum(drawn * total, total.nextafter(torch.zeros_like(total)))
        # The first sum above it: a token without probability adds nothing to the one before.
        tokens = torch.searchsorted(sums, places, right=True)[:, 0]
        return tokens.clamp(max=probs.shape[-1] - 1)  # of a row of NaN too

    def _uniform(self, seq: Sequence, device: torch.device) -> Tensor:
        """The sequence's next random number `[1]`, in [0, 1)."""
        generator = self._generator(seq, device)
        return torch.rand(1, generator=generator, device=device, dtype=torch.double)

    def _generator(self, seq: Sequence, device: torch.device) -> torch.Generator:
        generator = self._generators.get(seq.key)
        if generator is None:
            generator = self._generators[seq.key] = torch.Generator(device)
            if seq.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(_choice_seed(seq.params.seed, seq.key[1]))
        return generator

    @staticmethod
    def _with_logprobs(
        raw: Tensor, token_ids: Seq[int], sequences: Seq[Sequence]
    ) -> list[SampledToken]:
        sampled = [SampledToken(token_id) for token_id in token_ids]
        for i, seq in enumerate(sequences):
            num_top = seq.params.logprobs
            if num_top is None:
                continue
            logprobs = torch.log_softmax(raw[i], dim=-1)
            values, ids = logprobs.topk(num_top)
            top = [TokenLogprob(t, v) for t, v in zip(ids.tolist(), values.tolist(), strict=True)]
            token_id = token_ids[i]
            sampled[i] = SampledToken(token_id, float(logprobs[token_id]), top)
        return sampled


def probabilities(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """With which probability each token is drawn, up to a factor for each row.

    Args:
        logits: `[rows, vocab]`, penalties applied. params: one for each row, temperature above 0.
    """
    logits = logits / _column(logits, [p.temperature for p in params])
    cut = [i for i, p in enumerate(params) if p.top_k is not None or p.top_p < 1]
    if cut:
        logits[cut] = _keep_top(logits[cut], [params[i] for i in cut])
    probs = torch.softmax(logits, dim=-1)
    if any(p.min_p > 0 for p in params):
        floor = _column(logits, [p.min_p for p in params]) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0)
    return probs


def _keep_top(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """−inf outside each row's top_k and top_p; the likeliest token always stays.

    Which tokens a row keeps depends on that row alone, not on which others had to be sorted.
    """
    vocab = logits.shape[-1]
    kept, is_enough = _keep_among(logits, params, min(vocab, _NUM_CANDIDATES))
    left = [i for i, enough in enumerate(is_enough.tolist()) if not enough]
    if left:
        kept[left], _ = _keep_among(logits[left], [params[i] for i in left], vocab)
    return kept


def _keep_among(logits: Tensor, params: Seq[SamplingParams], num: int) -> tuple[Tensor, Tensor]:
    """As `_keep_top`, of each row's `num` likeliest tokens; and whether all it keeps are among
    them, `[rows]`."""
    vocab = logits.shape[-1]
    values, order = logits.topk(num, dim=-1)
    top_k = _column(logits, [min(p.top_k or vocab, vocab) for p in params])
    # Rounded sums pass 1 before the last token: a row without top_p must not lose its tail.
    top_p = _column(logits, [p.top_p if p.top_p < 1 else torch.inf for p in params])
    rank = torch.arange(num, device=logits.device)[None, :]
    values = values.masked_fill(rank >= top_k, -torch.inf)
    is_among = top_k <= num
    kept_total = values.logsumexp(dim=-1, keepdim=True)
    total = torch.where(is_among, kept_total, logits.logsumexp(dim=-1, keepdim=True))
    probs = (values - total).exp()
    sums = probs.cumsum(dim=-1)
    values = values.masked_fill((sums - probs >= top_p) & (rank > 0), -torch.inf)
    reaches = (top_k == vocab) & (sums[:, -1:] >= top_p)
    is_enough = is_among | reaches
    return torch.full_like(logits, -torch.inf).scatter_(-1, order, values), is_enough[:, 0]


def _column(like: Tensor, values: Seq[float]) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]


def _choice_seed(seed: int, index: int) -> int:
    """Choices of one request share its seed; a hash keeps choice 1 of seed 1 from being choice 0
    of seed 2."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
