"""The metrics' own rules; that the server feeds them is tested over HTTP."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import COUNTERS, GAUGES, TIERED, Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels' values."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_every_mirrored_key_has_its_own_sample() -> None:
    metrics = Metrics()
    before = samples(metrics)
    keys = [*GAUGES, *COUNTERS, *TIERED]
    metrics.update({key: float(i) for i, key in enumerate(keys)})
    after = samples(metrics)
    new = {name: value for name, value in after.items() if name not in before}
    assert sorted(new.values()) == list(range(len(keys)))
    assert all(name.startswith("polypeft_") for name in new)
    assert "polypeft_preemptions_total" in new
    assert "polypeft_adapter_bytes device" in new


def test_a_key_that_is_left_out_has_no_sample() -> None:
    metrics = Metrics()
    metrics.update({"num_running": 1})
    metrics.update({"num_waiting": 2})
    assert "polypeft_running_sequences" not in samples(metrics)
    assert samples(metrics)["polypeft_waiting_sequences"] == 2


def test_unknown_keys_are_mistakes() -> None:
    with pytest.raises(KeyError, match="num_runing"):
        Metrics().update({"num_runing": 1})


def test_two_servers_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.request("/health", 200, 0.1)
    one.generated(5)
    assert samples(one)["polypeft_requests_total /health 200"] == 1
    assert samples(other)["polypeft_generated_tokens_total"] == 0
