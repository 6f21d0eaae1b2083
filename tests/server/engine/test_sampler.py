"""Sampling against transformers' logits processors, OpenAI's formula and torch's log_softmax."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.sampler import Sampler, likeliest, probabilities
from server.engine.sequence import SamplingParams, Sequence

EOS = (3, 7)


def sequence(
    index: int = 0,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    virtual: int = 0,
    request: str = "r",
    **params: Any,
) -> Sequence:
    seq = Sequence(
        (request, index), prompt or [1], SamplingParams(**params), num_virtual_tokens=virtual
    )
    seq.token_ids += output or []
    return seq


def logits_like(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw_ids(sampler: Sampler, logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return [sampled.token_id for sampled in sampler.sample(logits, sequences)]


def histogram(logits: Tensor, num: int, **params: Any) -> Tensor:
    """How often each token is drawn from one row, by `num` requests."""
    sequences = [sequence(request=f"r{i}", seed=i, **params) for i in range(num)]
    ids = draw_ids(Sampler(EOS), logits.expand(num, -1), sequences)
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1])


def by_transformers(
    logits: Tensor,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    repetition_penalty: float = 1.0,
    min_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Probabilities, with the processors in the order in which `generate` applies them."""
    steps: list[Any] = [
        RepetitionPenaltyLogitsProcessor(repetition_penalty),
        MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, list(EOS)),
        TemperatureLogitsWarper(temperature),
    ]
    if top_k is not None:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        steps.append(MinPLogitsWarper(min_p))
    ids = torch.tensor([[*prompt, *output]])
    return torch.softmax(LogitsProcessorList(steps)(ids, logits[None].clone())[0], dim=-1)


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square goodness of fit; rare tokens are pooled."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-9:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.double)
    return 1.0 if len(expected) == 1 else float(torch.special.gammaincc(freedom, statistic / 2))


# -- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 4, "temperature": 2.0},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.2},
        {"min_p": 0.05, "temperature": 1.5},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.7},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.3, "temperature": 1.4},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, Any]) -> None:
    logits = logits_like(1, 12)
    expected = by_transformers(logits, **params)
    counts = histogram(logits, 3000, **params)
    assert not counts[expected == 0].any(), "a token that is not allowed"
    assert counts[expected > 0.01].all(), "an allowed token is never drawn"
    assert p_value(counts, expected) > 1e-3


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"min_tokens": 3},
        {"repetition_penalty": 1.3, "min_tokens": 9, "top_k": 5, "temperature": 0.8},
    ],
    ids=str,
)
def test_draws_after_a_prompt_and_output_follow_transformers(params: dict[str, Any]) -> None:
    logits = logits_like(2, 12)
    prompt, output = (1, 4, 4, 9), (2, 2)
    expected = by_transformers(logits, prompt=prompt, output=output, **params)
    counts = histogram(logits, 3000, prompt=list(prompt), output=list(output), **params)
    assert not counts[expected == 0].any()
    assert p_value(counts, expected) > 1e-3


def test_the_goodness_of_fit_would_notice() -> None:
    logits = logits_like(1, 12)
    counts = histogram(logits, 3000)
    assert p_value(counts, by_transformers(logits)) > 1e-3
    assert p_value(counts, by_transformers(logits, temperature=1.15)) < 1e-3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("vocab", [5, 50, 3000])
def test_rows_with_different_values_keep_what_transformers_keeps_of_each(
    seed: int, vocab: int
) -> None:
    rng = random.Random(seed)
    logits = logits_like(seed, 12, vocab, scale=3.0)
    rows: list[dict[str, Any]] = [
        {
            "temperature": rng.uniform(0.1, 2.1),
            "top_k": rng.choice([None, None, 1, 2, vocab // 2, vocab, vocab + 10]),
            "top_p": rng.choice([1.0, 1.0, 1e-6, 0.5, 0.95]),
            "min_p": rng.choice([0.0, 0.0, 0.1, 0.5, 1.0]),
        }
        for _ in range(12)
    ]
    actual = probabilities(logits, [SamplingParams(**params) for params in rows])
    actual /= actual.sum(-1, keepdim=True)
    for row, params, probs in zip(logits, rows, actual, strict=True):
        expected = by_transformers(row, **params | {"top_k": min(params["top_k"] or vocab, vocab)})
        assert torch.equal(probs > 0, expected > 0), params
        torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-7)
        assert probs[row.argmax()] > 0


def test_a_row_keeps_its_tail_beside_rows_that_lose_theirs() -> None:
    """Of a large vocabulary, rounded probabilities sum up to more than 1 before the last token."""
    logits = logits_like(0, 20, 50_000, scale=3.0)
    params = [SamplingParams(), *[SamplingParams(top_p=0.5)] * 18, SamplingParams(top_k=7)]
    for row in logits:
        alone = probabilities(row[None], params[:1])[0]
        beside = probabilities(torch.stack([row, *logits[1:]]), params)[0]
        assert torch.equal(alone, beside)
        assert (alone > 0).all()


def test_the_likeliest_token_always_stays() -> None:
    logits = logits_like(4, 6, 40)
    for params in (
        {"top_p": 1e-12},
        {"top_p": 0.0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 1e-5},
    ):
        counts = [histogram(row, 20, **params) for row in logits]
        assert [int(c.argmax()) for c in counts] == logits.argmax(-1).tolist(), params
        assert all(c.max() == 20 for c in counts), params


# -- penalties and bans --------------------------------------------------------------------------


def changed(logits: Tensor, seq: Sequence) -> Tensor:
    """One row's logits before temperature, from the log of the probabilities at temperature 1."""
    row = logits.clone()
    Sampler(EOS)._change(row, seq)
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = logits_like(5, 30)
    prompt, output = [1, 2, 2, 8, 29], [2, 5, 5, 0]
    seq = sequence(prompt=prompt, output=output, virtual=4, repetition_penalty=penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + output]), logits[None].clone())[0]
    assert torch.equal(changed(logits, seq), expected)


def test_placeholders_of_virtual_tokens_are_not_penalised() -> None:
    """They stand as zeros in the sequence, and no token 0 was said."""
    logits = logits_like(5, 30)
    seq = sequence(prompt=[4], output=[5], virtual=3, repetition_penalty=2.0, presence_penalty=2.0)
    assert changed(logits, seq)[0] == logits[0]


def test_presence_and_frequency_penalties_are_openai_s() -> None:
    """μ[j] − c[j]·α_frequency − [c[j] > 0]·α_presence, with c counted over what was sampled."""
    logits = logits_like(6, 10)
    output = [4, 4, 4, 9, 0, 9]
    for frequency, presence in ((0.5, 0.0), (0.0, 0.7), (-1.5, 2.0), (0.3, -0.2)):
        seq = sequence(
            prompt=[1, 2, 4], output=output, frequency_penalty=frequency, presence_penalty=presence
        )
        expected = [
            mu - output.count(j) * frequency - (output.count(j) > 0) * presence
            for j, mu in enumerate(logits.tolist())
        ]
        torch.testing.assert_close(changed(logits, seq), torch.tensor(expected))


def test_no_output_no_penalty() -> None:
    logits = logits_like(6, 10)
    seq = sequence(prompt=[1, 2], frequency_penalty=1.0, presence_penalty=1.0)
    assert torch.equal(changed(logits, seq), logits)


@pytest.mark.parametrize("num_output", range(5))
def test_ends_are_banned_until_min_tokens(num_output: int) -> None:
    logits = logits_like(7, 10)
    output = [1] * num_output
    processor = MinNewTokensLengthLogitsProcessor(1, 3, [*EOS, 5])
    expected = processor(torch.tensor([[1, *output]]), logits[None].clone())[0]
    seq = sequence(output=output, min_tokens=3, stop_token_ids=(5,))
    assert torch.equal(changed(logits, seq), expected)
    assert bool((changed(logits, seq)[[*EOS, 5]] == -torch.inf).all()) == (num_output < 3)


def test_min_tokens_without_any_end_token() -> None:
    logits = logits_like(7, 1, 10)
    (token,) = Sampler(()).sample(logits, [sequence(min_tokens=3, temperature=0)])
    assert token.token_id == int(logits.argmax())


def test_greedy_takes_the_best_after_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5, 0.0]] * 3)
    sequences = [
        sequence(0, temperature=0),
        sequence(1, temperature=0, repetition_penalty=1.5),
        sequence(2, temperature=0, prompt=[0], output=[1], presence_penalty=1.0),
    ]
    before = logits.clone()
    assert draw_ids(Sampler(EOS), logits, sequences) == [1, 2, 2]
    assert torch.equal(logits, before), "the caller's logits were changed"


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 512, 1000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_is_argmax_s(vocab: int, dtype: torch.dtype) -> None:
    """Ties, of which bfloat16 has many, and what is not finite included."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator).to(dtype)
    logits[1] = -torch.inf
    logits[2] = 3.0
    logits[3, vocab // 2 :] = torch.inf
    logits[4, vocab // 3 :: 7] = torch.nan
    logits[5:20, torch.randint(vocab, (15,), generator=generator)] = 9.0
    logits[20, -1] = 9.0
    assert torch.equal(likeliest(logits), logits.argmax(dim=-1))
    assert torch.equal(likeliest(logits[:0]), torch.empty(0, dtype=torch.long))


def test_greedy_ignores_the_seed_and_what_would_be_kept() -> None:
    logits = logits_like(8, 4, 50)
    sequences = [sequence(i, temperature=0, seed=i, top_k=3, top_p=0.1) for i in range(4)]
    assert draw_ids(Sampler(EOS), logits, sequences) == logits.argmax(-1).tolist()


# -- seeds ---------------------------------------------------------------------------------------


def run(sampler: Sampler, seq: Sequence, steps: int = 12, vocab: int = 100) -> list[int]:
    """Draw a sequence's tokens one after the other, by itself."""
    for step in range(steps):
        seq.token_ids += draw_ids(sampler, logits_like(step, 1, vocab, scale=0.5), [seq])
    return seq.output_token_ids


def test_a_seed_repeats() -> None:
    one, again = (run(Sampler(EOS), sequence(request=r, seed=11)) for r in ("a", "b"))
    assert one == again
    assert one != run(Sampler(EOS), sequence(seed=12))
    assert len(set(one)) > 5, "each step draws anew"


def test_choices_of_one_request_differ_and_repeat() -> None:
    """Though they share its seed."""
    first = [run(Sampler(EOS), sequence(i, seed=11)) for i in range(6)]
    again = [run(Sampler(EOS), sequence(i, seed=11)) for i in range(6)]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 6


def test_without_a_seed_draws_differ() -> None:
    sampler = Sampler(EOS)
    outputs = [run(sampler, sequence(request=f"r{i}")) for i in range(4)]
    assert len({tuple(tokens) for tokens in outputs}) == 4


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_seeds_are_seeds(seed: int) -> None:
    one, again = (run(Sampler(EOS), sequence(3, seed=seed)) for _ in range(2))
    assert one == again


def test_a_draw_does_not_depend_on_the_batch() -> None:
    """Alone, among others of all kinds, and in any order of rows."""
    rng = random.Random(3)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.02},
        {"temperature": 1.5, "repetition_penalty": 1.3}, {"min_tokens": 4, "top_p": 0.99},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": 2},
    ]  # fmt: skip
    steps, vocab = 6, 2000
    rows = {i: logits_like(i, steps, vocab) for i in range(3 * len(kinds))}

    def make(i: int) -> Sequence:
        return sequence(request=f"r{i}", seed=i, **kinds[i % len(kinds)])

    alone: dict[int, list[Any]] = {}
    for i, logits in rows.items():
        seq, sampler = make(i), Sampler(EOS)
        alone[i] = [sampler.sample(logits[step, None], [seq])[0] for step in range(steps)]
    together, sampler = {i: make(i) for i in rows}, Sampler(EOS)
    seen: dict[int, list[Any]] = {i: [] for i in rows}
    for step in range(steps):
        # As where prompts are still computed, some rows sample later than others.
        order = [i for i in rows if step == 0 or rng.random() < 0.8]
        rng.shuffle(order)
        logits = torch.stack([rows[i][len(seen[i])] for i in order])
        for i, token in zip(
            order, sampler.sample(logits, [together[i] for i in order]), strict=True
        ):
            seen[i].append(token)
    for i, tokens in seen.items():
        assert tokens == alone[i][: len(tokens)], kinds[i % len(kinds)]
    assert sum(map(len, seen.values())) > 80


def test_a_forgotten_sequence_leaves_nothing() -> None:
    sampler = Sampler(EOS)
    seq = sequence(seed=5)
    first = run(sampler, seq)
    sampler.forget(seq)
    assert not sampler._generators
    sampler.forget(seq)  # one that never drew
    assert run(sampler, sequence(seed=5)) == first


# -- log probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_model_s_own(dtype: torch.dtype) -> None:
    """Of the raw logits: temperature, penalties and top_k are not in them."""
    logits = logits_like(9, 3, 200).to(dtype)
    sequences = [
        sequence(0, logprobs=5, temperature=0),
        sequence(1, logprobs=3, seed=1, temperature=1.9, top_k=50, repetition_penalty=2.0),
        sequence(2, logprobs=0, seed=1, prompt=[3], output=[4], presence_penalty=2.0),
    ]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, seq, token in zip(
        expected, sequences, Sampler(EOS).sample(logits, sequences), strict=True
    ):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-5)
        values, ids = row.topk(seq.params.logprobs or 0)
        assert [top.token_id for top in token.top] == ids.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_no_logprobs_where_none_were_asked_for() -> None:
    logits = logits_like(9, 2, 20)
    plain, asked = Sampler(EOS).sample(logits, [sequence(0, seed=1), sequence(1, logprobs=1)])
    assert plain.logprob is None
    assert list(plain.top) == []
    assert asked.logprob is not None
    assert len(asked.top) == 1


# -- impossible tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 15}, {"top_p": 0.999}, {"min_p": 1e-9}, {"repetition_penalty": 0.1}],
    ids=str,
)
def test_a_token_at_minus_infinity_is_never_drawn(params: dict[str, Any]) -> None:
    logits = logits_like(10, 20, scale=0.1)
    logits[5:] = -torch.inf
    counts = histogram(logits, 500, prompt=[7, 8], **params)
    assert counts[:5].all()
    assert not counts[5:].any()
    counts = histogram(torch.full((20,), -torch.inf).index_fill(0, torch.tensor(6), 1.0), 50)
    assert counts[6] == 50


def test_a_row_without_any_possible_token_harms_no_other() -> None:
    logits = logits_like(11, 3, 20)
    logits[1] = -torch.inf
    sequences = [sequence(i, seed=4, **params) for i, params in enumerate(({}, {}, {"top_p": 0.9}))]
    ids = draw_ids(Sampler(EOS), logits, sequences)
    assert ids[1] in range(20)
    for i in (0, 2):
        fresh = sequence(i, seed=4, **({"top_p": 0.9} if i else {}))
        assert draw_ids(Sampler(EOS), logits[i, None], [fresh]) == [ids[i]]
