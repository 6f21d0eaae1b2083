"""The metrics' own rules; that the server feeds them is tested over HTTP."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import (
    COUNTERS,
    GAUGES,
    MAX_ADAPTER_LABELS,
    OTHER,
    TIERED,
    AdapterUsage,
    Metrics,
)


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
    one.begun([], 1)(5)
    assert samples(one)["polypeft_requests_total /health 200"] == 1
    assert samples(other)["polypeft_generated_tokens_total"] == 0


def test_an_idle_adapter_stays_and_a_deleted_one_goes() -> None:
    metrics = Metrics()
    metrics.update_adapters(AdapterUsage(names=["poet", "clerk"]))
    assert samples(metrics)["polypeft_adapter_tokens_total clerk generated"] == 0
    generated = metrics.begun(["poet"], 3)
    for num_tokens in (2, 3):
        generated(num_tokens)
    for _ in range(3):
        metrics.update_adapters(AdapterUsage(names=["poet", "clerk"]))
    found = samples(metrics)
    assert found["polypeft_adapter_tokens_total poet prompt"] == 3
    assert found["polypeft_adapter_tokens_total poet generated"] == 5
    assert found["polypeft_adapter_requests_total clerk"] == 0
    metrics.update_adapters(AdapterUsage(names=["clerk"]))
    generated(1)  # of a request that runs on
    assert not any("poet" in name for name in samples(metrics))


def test_adapter_labels_are_bounded() -> None:
    """However many there are and have been; what has no label of its own counts together."""
    metrics = Metrics()
    for generation in range(3):
        names = [f"adapter-{generation}-{i}" for i in range(MAX_ADAPTER_LABELS + 50)]
        metrics.update_adapters(AdapterUsage(names=names))
        for name in names:
            metrics.begun([name], 1)(2)
        metrics.begun([], 1)(1)
        metrics.begun(names[:2], 1)(1)
        found = samples(metrics)
        series = [name for name in found if name.startswith("polypeft_adapter_requests_total")]
        assert len(series) == MAX_ADAPTER_LABELS + 3
        assert found[f"polypeft_adapter_requests_total {OTHER}"] == 50 * (generation + 1)
        assert found["polypeft_adapter_tokens_total _base prompt"] == generation + 1
        assert found["polypeft_adapter_requests_total _mixture"] == generation + 1


def test_vllms_gauge_has_one_sample() -> None:
    metrics = Metrics()
    for running in (["poet"], ["clerk", "poet"]):
        metrics.update_adapters(
            AdapterUsage(names=["clerk", "poet"], running=running, waiting=[], max_resident=7)
        )
    (family,) = [
        family
        for family in text_string_to_metric_families(metrics.render().decode())
        if family.name == "vllm:lora_requests_info"
    ]
    (sample,) = family.samples
    assert sample.labels == {
        "max_lora": "7",
        "running_lora_adapters": "clerk,poet",
        "waiting_lora_adapters": "",
    }
