"""Percentiles, fairness and medians of made-up outcomes."""

from __future__ import annotations

import pytest

from loadtests.figures import fairness, figures, jain_index, percentiles, ratios, summarize
from loadtests.phase import Outcome, Phase


def outcome(model: str = "a", *, due: float = 0.0, times: tuple[float, ...] = (1.0,)) -> Outcome:
    """A token an event, the stream's end half a second after the last."""
    return Outcome(model, "ok", due, times[-1] + 0.5, times, len(times))


def test_percentiles_interpolate() -> None:
    found = percentiles("x", [float(i) for i in range(101)])
    assert found == {"x_p50_s": 50.0, "x_p95_s": 95.0, "x_p99_s": 99.0}
    assert percentiles("x", [1.0, 2.0])["x_p95_s"] == pytest.approx(1.95)
    assert percentiles("x", []) == {}


def test_jain_index_of_known_cases() -> None:
    assert jain_index([3.0] * 7) == pytest.approx(1)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain_index([1.0, 3.0]) == pytest.approx(16 / 20)
    assert jain_index([10.0, 30.0]) == pytest.approx(16 / 20)  # of any unit
    assert jain_index([0.0, 0.0]) == 1


def test_a_phase_in_figures() -> None:
    first = outcome(due=1.0, times=(2.0, 2.5, 4.0))
    second = outcome("b", due=2.0, times=(5.0,))
    failed = Outcome("b", "503", 0.0, 9.0, (), 0)
    found = figures(Phase([first, second, failed], seconds=10.0, counters={"num_loads": 2.0}))
    assert found["output_tokens_per_s"] == pytest.approx(0.4)
    assert found["requests_per_s"] == pytest.approx(0.2)
    assert found["ttft_p50_s"] == pytest.approx((1 + 3) / 2)
    assert found["itl_p50_s"] == pytest.approx((0.5 + 1.5) / 2)  # no gap across requests
    assert found["e2e_p50_s"] == pytest.approx(3.5)
    assert found["tokens_per_event"] == 1
    assert found["num_loads"] == 2


def test_a_phase_that_failed_has_no_latencies() -> None:
    found = figures(Phase([Outcome("a", "timeout", 0.0, 5.0)], seconds=5.0))
    assert found["output_tokens_per_s"] == 0
    assert not any(name.startswith(("ttft", "itl", "e2e")) for name in found)
    assert fairness([Outcome("a", "timeout", 0.0, 5.0)]) == {}


def test_fairness_is_of_speeds_not_of_popularity() -> None:
    popular = [outcome("a", times=(0.5, 1.5)) for _ in range(9)]
    assert fairness([*popular, outcome("b", times=(0.5, 1.5))])["jain_index"] == pytest.approx(1)
    slow = fairness([*popular, outcome("b", times=(0.5, 5.5))])
    assert slow["jain_index"] == pytest.approx((1 + 1 / 3) ** 2 / (2 * (1 + 1 / 9)))
    assert slow["slowest"] == {"model": "b", "output_tokens_per_s": pytest.approx(1 / 3)}
    assert slow["fastest"]["model"] == "a"


def test_medians_over_rounds() -> None:
    phases = [Phase([outcome(times=(t,))], seconds=s) for t, s in [(1, 1), (2, 4), (9, 2)]]
    phases[0].outcomes.append(Outcome("a", "404", 0.0, 1.0, message="no model a"))
    found = summarize(phases)
    assert found["output_tokens_per_s"] == 0.5
    assert found["ttft_p50_s"] == 2
    assert (found["num_requests"], found["errors"]) == (4, {"404": 1})
    assert found["messages"] == ["no model a"]
    assert [r["seconds"] for r in found["rounds"]] == [1, 4, 2]


def test_ratios_are_of_one_round() -> None:
    def rounds(*speeds: float) -> list[dict[str, float]]:
        return [{"output_tokens_per_s": speed} for speed in speeds]

    found = ratios(rounds(90, 40, 35, 80, 45), rounds(100, 50, 50, 100, 50))  # .9 .8 .7 .8 .9
    assert found == {
        "ratio": pytest.approx(0.8),
        "ratio_p25": pytest.approx(0.8),
        "ratio_p75": pytest.approx(0.9),
    }
    assert ratios(rounds(1, 2), rounds(1, 2))["ratio"] == 1
    assert ratios(rounds(1, 2), rounds(1, 0)) == {}
