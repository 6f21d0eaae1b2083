"""What a load test asks for, without a server: popularities, arrivals, prompts, a trace."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loadtests.traffic import (
    POPULARITIES,
    Case,
    Prompts,
    Slot,
    choose,
    clip,
    closed_loop,
    poisson,
    read_trace,
    requests_of,
)

NUM = 20_000


def shares(popularity: str, num_adapters: int, zipf_s: float = 1.0) -> np.ndarray:
    """The share of requests that each adapter gets, `[num_adapters]`."""
    chosen = choose(
        popularity,
        NUM,
        num_adapters,
        num_streams=4,
        zipf_s=zipf_s,
        rng=random.Random(0),
    )
    counts = Counter(chosen)
    assert set(counts) <= set(range(num_adapters))
    return np.array([counts[i] / NUM for i in range(num_adapters)])


def test_distinct_gives_each_stream_its_own() -> None:
    chosen = choose("distinct", 10, 6, num_streams=4, zipf_s=1, rng=random.Random(0))
    assert chosen == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    chosen = choose("distinct", 8, 3, num_streams=4, zipf_s=1, rng=random.Random(0))
    assert chosen == [0, 1, 2, 0, 0, 1, 2, 0]


def test_identical() -> None:
    assert shares("identical", 5).tolist() == [1, 0, 0, 0, 0]


def test_uniform() -> None:
    assert shares("uniform", 8) == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_zipf_follows_its_power(s: float) -> None:
    law = np.arange(1, 51, dtype=float) ** -s
    assert shares("zipf", 50, s) == pytest.approx(law / law.sum(), abs=0.012)


@pytest.mark.parametrize("num_adapters", [2, 3, 9])
def test_skewed_gives_half_to_one(num_adapters: int) -> None:
    found = shares("skewed", num_adapters)
    assert found[0] == pytest.approx(0.5, abs=0.012)
    assert found[1:] == pytest.approx(0.5 / (num_adapters - 1), abs=0.012)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_one_adapter_gets_all(popularity: str) -> None:
    assert shares(popularity, 1).tolist() == [1]


def test_an_unknown_popularity_is_refused() -> None:
    with pytest.raises(ValueError, match="'fair' is not one of distinct"):
        shares("fair", 2)


def test_prompts_have_exact_lengths_and_no_common_first_token() -> None:
    prompts = Prompts(range(100, 150), random.Random(0))
    drawn = [prompts.draw(n) for n in range(1, 51)]
    assert [len(p) for p in drawn] == list(range(1, 51))
    assert len({p[0] for p in drawn}) == 50
    assert set().union(*drawn) <= set(range(100, 150))
    with pytest.raises(ValueError, match="more prompts than the 50 tokens"):
        prompts.draw(3)


def test_poisson_arrives_at_its_rate() -> None:
    slots = poisson(NUM, 4.0, 10, 5, random.Random(0))
    times = np.array([slot.arrival for slot in slots], dtype=float)
    gaps = np.diff(times, prepend=0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential: its mean
    assert slots[0].num_prompt, slots[0].num_output == (10, 5)


def trace(
    folder: Path, *rows: str, header: str = "TIMESTAMP,ContextTokens,GeneratedTokens"
) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *rows, ""]))
    return path


def test_a_trace_is_read_by_its_clock(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        "2023-11-16 23:59:59.5000000,374,44",
        "2023-11-17 00:00:00.0000000,5000,44",
        "2023-11-17 00:00:01.5000001,396,109",
        "2023-11-17 00:00:02.0000000,1,2",
    )
    assert read_trace(path, 2, 4.0, 1000) == [Slot(0.0, 374, 44), Slot(0.5, 396, 109)]
    assert len(read_trace(path, 9, 1.0, None)) == 4


def test_clipped_slots_keep_their_arrivals() -> None:
    slots = [Slot(0.0, 374, 44), Slot(0.5, 20, 0)]
    assert clip(slots, 100, 10) == [Slot(0.0, 100, 10), Slot(0.5, 20, 1)]


def test_a_trace_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path = trace(tmp_path, "1,2,3", header="time,prompt,output")
    with pytest.raises(ValueError, match="the columns TIMESTAMP, ContextTokens"):
        read_trace(path, 1, 1.0, None)
    path = trace(tmp_path, "2023-11-16 18:15:46.6805900,374,44")
    with pytest.raises(ValueError, match="no request of at most 100 tokens"):
        read_trace(path, 1, 1.0, 100)


def test_requests_take_slots_in_order() -> None:
    case = Case("distinct", ["a", "b", "c"], "distinct")
    rng = random.Random(0)
    prompts = Prompts(range(1000), rng)

    def models(slots: list[Slot]) -> str:
        made = requests_of(case, slots, prompts, num_streams=2, zipf_s=1, rng=rng)
        assert [r.slot for r in made] == slots
        assert all(len(r.prompt) == r.slot.num_prompt for r in made)
        return "".join(r.model for r in made)

    assert models(closed_loop(5, 7, 3)) == "ababa"
    assert models(poisson(5, 1.0, 7, 3, rng)) == "abcab"  # no streams: all in turn
