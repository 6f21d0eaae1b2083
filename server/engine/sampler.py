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

from peftcore.upload import to_device, upload
from server.engine.guided import Guides
from server.engine.sequence import SampledToken, SamplingParams, Sequence, TokenLogprob
from server.errors import ServerError

#: Rows of a prompt whose logits are in float32 at once.
_SCORED_ROWS = 32
#: Likeliest tokens among which top_k and top_p are looked for, before all are sorted.
_NUM_CANDIDATES = 1024
#: Logits whose largest is found at once.
_SPAN = 256


class Sampler:
    """Draws the next token of each sequence.

    Args:
        eos_token_ids: tokens that end a sequence, banned before `min_tokens`.
        looks_between: may the host look at values before a step's tokens are known? On a GPU it
            would wait for them: what it would have looked at comes with the tokens then, and the
            few rows for which it tells are drawn again.
    """

    def __init__(self, eos_token_ids: Seq[int], *, looks_between: bool = True) -> None:
        self._eos = list(eos_token_ids)
        self._looks_between = looks_between
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
        token_ids = self._choose(logits, sequences)
        sampled = self._with_logprobs(raw, token_ids, sequences)
        if not guided:
            return sampled
        failed |= self._guides.accept(sequences, token_ids, [i for i in guided if i not in failed])
        return [failed.get(i, token) for i, token in enumerate(sampled)]

    def _choose(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
        """The likeliest token of a row, or one drawn."""
        tokens = likeliest(logits)
        drawn = [i for i, seq in enumerate(sequences) if seq.params.temperature > 0]
        if not drawn:
            greedy: list[int] = tokens.tolist()
            return greedy
        device = logits.device
        params = [sequences[i].params for i in drawn]
        numbers = to_device(torch.cat([self._uniform(sequences[i]) for i in drawn]), device)
        rows = upload(drawn, torch.long, device)
        if self._looks_between:
            tokens[rows] = _draw(probabilities(logits[rows], params), numbers)
            token_ids: list[int] = tokens.tolist()
            return token_ids
        probs, is_right = probabilities_among(logits[rows], params, _NUM_CANDIDATES)
        tokens[rows] = _draw(probs, numbers)
        found = torch.cat([tokens, is_right.long()]).tolist()
        token_ids = found[: len(sequences)]
        left = [at for at, right in enumerate(found[len(sequences) :]) if not right]
        if left:
            places = upload(left, torch.long, device)
            own = [params[at] for at in left]
            probs, _ = probabilities_among(logits[rows[places]], own, logits.shape[-1])
            again = _draw(probs, numbers[places]).tolist()
            for at, token_id in zip(left, again, strict=True):
                token_ids[drawn[at]] = token_id
        return token_ids

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
            places = upload(targets, torch.long, rows.device)
            own = rows.gather(1, places[:, None])[:, 0] - log_total
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
        p, device = seq.params, logits.device
        if p.logit_bias:
            biased = upload([token_id for token_id, _ in p.logit_bias], torch.long, device)
            logits[biased] += upload([b for _, b in p.logit_bias], logits.dtype, device)
        output = seq.output_token_ids
        if p.repetition_penalty != 1:
            seen = upload(sorted({*seq.prompt_token_ids, *output}), torch.long, device)
            values = logits[seen]
            penalty = p.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if output and (p.presence_penalty or p.frequency_penalty):
            ids, counts = torch.unique(torch.tensor(output), return_counts=True)
            off = p.frequency_penalty * to_device(counts, device) + p.presence_penalty
            logits[to_device(ids, device)] -= off
        if p.grammar is None:
            self._ban_stops(logits, seq)

    def _ban_stops(self, logits: Tensor, seq: Sequence) -> None:
        """No end before `min_tokens`, in one row `[vocab]`; a grammar's end comes all the same."""
        if seq.num_output_tokens >= seq.params.min_tokens:
            return
        ids = [*self._eos, *seq.params.stop_token_ids]
        stops = upload(ids, torch.long, logits.device)
        kept = logits[stops]
        logits[stops] = -torch.inf
        if seq.params.grammar is not None:
            logits[stops] = torch.where((logits > -torch.inf).any(), -torch.inf, kept)

    def _uniform(self, seq: Sequence) -> Tensor:
        """The sequence's next random number `[1]`, in [0, 1): on every device the same one."""
        return torch.rand(1, generator=self._generator(seq), dtype=torch.double)

    def _generator(self, seq: Sequence) -> torch.Generator:
        generator = self._generators.get(seq.key)
        if generator is None:
            generator = self._generators[seq.key] = torch.Generator()
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
        asked = [(i, s.params.logprobs) for i, s in enumerate(sequences)]
        wanted = [(i, num_top) for i, num_top in asked if num_top is not None]
        if not wanted:
            return sampled
        values, ids = [], []
        for i, num_top in wanted:
            logprobs = torch.log_softmax(raw[i], dim=-1)
            likeliest = logprobs.topk(num_top)
            values += [logprobs[token_ids[i], None], likeliest.values]
            ids.append(likeliest.indices)
        # All of them at once to the host.
        all_values, all_ids = iter(torch.cat(values).tolist()), iter(torch.cat(ids).tolist())
        for i, num_top in wanted:
            own = next(all_values)
            top = [TokenLogprob(next(all_ids), next(all_values)) for _ in range(num_top)]
            sampled[i] = SampledToken(token_ids[i], own, top)
        return sampled


def likeliest(logits: Tensor) -> Tensor:
    """As `logits.argmax(dim=-1)`, the first of equals and of NaNs, for `[rows, vocab]`.

    On a CPU torch looks at one value after another there; `amax` takes many at once. So the largest
    of every few hundred are found first, and then where in its span the largest of them stands.
    """
    vocab = logits.shape[-1]
    whole = vocab // _SPAN * _SPAN
    if not logits.is_cpu or whole == 0:
        return logits.argmax(dim=-1)
    tops = logits[:, :whole].unflatten(-1, (-1, _SPAN)).amax(dim=-1)
    if whole < vocab:
        tops = torch.cat([tops, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    starts = tops.argmax(dim=-1) * _SPAN
    places = (starts[:, None] + torch.arange(_SPAN)).clamp(max=vocab - 1)
    return starts + logits.gather(1, places).argmax(dim=-1)


def _draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """Sampled tokens `[rows]`: where a number falls among the summed probabilities.

    Args:
        probs: `[rows, vocab]`, of any sum. numbers: `[rows]` float64 in [0, 1).
    """
    sums = probs.cumsum(dim=-1, dtype=torch.double)
    total = sums[:, -1:]
    # Rounded up to the total it would fall behind the last token.
    places = torch.minimum(numbers[:, None] * total, total.nextafter(torch.zeros_like(total)))
    # The first sum above it: a token without probability adds nothing to the one before.
    tokens = torch.searchsorted(sums, places, right=True)[:, 0]
    return tokens.clamp(max=probs.shape[-1] - 1)  # of a row of NaN too


def probabilities(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """With which probability each token is drawn, up to a factor for each row.

    Args:
        logits: `[rows, vocab]`, penalties applied. params: one for each row, temperature above 0.
    """
    return _probabilities(logits, params, None)[0]


def probabilities_among(
    logits: Tensor, params: Seq[SamplingParams], num: int
) -> tuple[Tensor, Tensor]:
    """As `probabilities`, from each row's `num` likeliest tokens where some are to be left out; and
    `[rows]` whether that gives the same. No value is looked at."""
    return _probabilities(logits, params, num)


def _probabilities(
    logits: Tensor, params: Seq[SamplingParams], num: int | None
) -> tuple[Tensor, Tensor]:
    logits = logits / _column(logits, [p.temperature for p in params])
    is_right = torch.ones(len(params), dtype=torch.bool, device=logits.device)
    cut = [i for i, p in enumerate(params) if p.top_k is not None or p.top_p < 1]
    if cut:
        rows = upload(cut, torch.long, logits.device)
        kept, is_enough = _keep_top(logits[rows], [params[i] for i in cut], num)
        logits[rows], is_right[rows] = kept, is_enough
    probs = torch.softmax(logits, dim=-1)
    if any(p.min_p > 0 for p in params):
        floor = _column(logits, [p.min_p for p in params]) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0)
    return probs, is_right


def _keep_top(
    logits: Tensor, params: Seq[SamplingParams], num: int | None
) -> tuple[Tensor, Tensor]:
    """−inf outside each row's top_k and top_p; the likeliest token always stays.

    Which tokens a row keeps depends on that row alone, not on which others had to be sorted.

    Args:
        num: among how many tokens of each row; None: among as many as it takes.

    Returns:
        The logits, and `[rows]` whether they are right, as all are without `num`.
    """
    vocab = logits.shape[-1]
    if num is not None:
        return _keep_among(logits, params, min(vocab, num))
    kept, is_enough = _keep_among(logits, params, min(vocab, _NUM_CANDIDATES))
    left = [i for i, enough in enumerate(is_enough.tolist()) if not enough]
    if left:
        rows = upload(left, torch.long, logits.device)
        kept[rows], is_enough[rows] = _keep_among(logits[rows], [params[i] for i in left], vocab)
    return kept, is_enough


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
    return upload(values, like.dtype, like.device)[:, None]


def _choice_seed(seed: int, index: int) -> int:
    """Choices of one request share its seed; a hash keeps choice 1 of seed 1 from being choice 0
    of seed 2."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
