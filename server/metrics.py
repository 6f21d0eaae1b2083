"""What the server counts, in Prometheus' format. Knows nothing of HTTP or of the engine.

Two kinds of metric: events are recorded as they happen, by the methods; everything that the engine
keeps count of itself is mirrored from the mapping last given to `update`. Labels take few values:
routes, status codes, tiers, and at most `MAX_ADAPTER_LABELS` registered adapters; never a client's
words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: What `render` writes.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Keys of `update` that go up and down → (metric, help).
GAUGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "num_running": ("running_sequences", "Sequences in the running batch."),
        "num_waiting": ("waiting_sequences", "Sequences that wait to be admitted."),
        "kv_blocks": ("kv_blocks", "Blocks of the KV cache."),
        "kv_blocks_used": ("kv_blocks_used", "Blocks of the KV cache that sequences hold."),
    }
)

#: Keys of `update` that only grow, as totals since the start → (metric, help).
COUNTERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "num_preemptions": ("preemptions", "Sequences put back for want of KV blocks."),
        "num_prompt_tokens": ("prefix_query_tokens", "Prompt positions looked up in the KV cache."),
        "num_prefix_hit_tokens": ("prefix_hit_tokens", "Prompt positions found in the KV cache."),
        "num_adapter_hits": ("adapter_hits", "Admissions that found their adapter resident."),
        "num_adapter_misses": ("adapter_misses", "Admissions that had to load their adapter."),
        "num_adapter_loads": ("adapter_loads", "Adapters brought to the device."),
        "num_adapter_evictions": ("adapter_evictions", "Adapters evicted from the device."),
        "num_adapter_failures": ("adapter_failures", "Adapters that could not be loaded."),
        "adapter_load_seconds": ("adapter_load_seconds", "Seconds spent loading adapters."),
    }
)

#: Keys of `update` that are one tier's value of a gauge → (metric, tier).
TIERED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "adapter_device_bytes": ("adapter_bytes", "device"),
        "adapter_host_bytes": ("adapter_bytes", "host"),
        "adapter_disk_bytes": ("adapter_bytes", "disk"),
        "adapter_device_capacity_bytes": ("adapter_capacity_bytes", "device"),
        "adapter_host_capacity_bytes": ("adapter_capacity_bytes", "host"),
    }
)

_TIERED_HELP: Mapping[str, str] = MappingProxyType(
    {
        "adapter_bytes": "Bytes that adapters take, by tier.",
        "adapter_capacity_bytes": "Bytes that adapters may take, by tier.",
    }
)

#: Most adapters that have a label of their own: those registered first. The others share one.
MAX_ADAPTER_LABELS = 100
#: What no adapter can be called.
BASE, MIXTURE, OTHER = "_base", "_mixture", "_other"

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


@dataclass(frozen=True)
class AdapterUsage:
    """What the registry and the engine say of adapters at one moment.

    Attributes:
        names: all registered ones, in the order of their registration.
        num_by_tier: how many digests lie on the device, in host memory, on disk.
        running, waiting: names that sequences run with, and wait for.
        max_resident: how many adapters of the registered ones' mean size the device holds.
        num_pinned: names that are pinned.
    """

    names: Sequence[str] = ()
    num_by_tier: Mapping[str, int] = field(default_factory=dict)
    running: Sequence[str] = ()
    waiting: Sequence[str] = ()
    max_resident: int = 0
    num_pinned: int = 0


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "polypeft_requests",
            "Requests answered.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "polypeft_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "polypeft_prompt_tokens", "Prompt tokens taken in.", registry=self.registry
        )
        self._generated_tokens = Counter(
            "polypeft_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self._first_token = Histogram(
            "polypeft_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._next_token = Histogram(
            "polypeft_inter_token_seconds",
            "Seconds between two tokens of one choice.",
            buckets=_NEXT_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._adapter_requests = Counter(
            "polypeft_adapter_requests",
            "Requests that were taken in, by adapter.",
            ["adapter"],
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "polypeft_adapter_tokens",
            "Tokens by adapter; kind is prompt or generated.",
            ["adapter", "kind"],
            registry=self.registry,
        )
        self._labels: set[str] = set()
        for label in (BASE, MIXTURE, OTHER):
            self._add_label(label)
        self._mirror = _Mirror()
        self.registry.register(self._mirror)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered. `endpoint` is a route's pattern, not a client's path."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)

    def begun(self, adapters: Sequence[str], num_prompt: int) -> Callable[[int], None]:
        """A request was taken in; what is returned is to be told each step's number of tokens.

        Args:
            adapters: registered names; empty for the base.
            num_prompt: tokens of its prompts.
        """
        label = BASE if not adapters else MIXTURE if len(adapters) > 1 else adapters[0]
        if label not in self._labels and not self._has_room():
            label = OTHER
        self._add_label(label)
        self._prompt_tokens.inc(num_prompt)
        self._adapter_requests.labels(label).inc()
        self._adapter_tokens.labels(label, "prompt").inc(num_prompt)
        own = self._adapter_tokens.labels(label, "generated")

        def generated(num_tokens: int) -> None:
            self._generated_tokens.inc(num_tokens)
            own.inc(num_tokens)

        return generated

    def update_adapters(self, usage: AdapterUsage) -> None:
        """Mirror the adapters. One that is registered has its series before it is first used and
        however long it idles; they go when it is deleted."""
        registered = set(usage.names)
        for label in self._labels - registered - {BASE, MIXTURE, OTHER}:
            self._labels.discard(label)
            self._adapter_requests.remove(label)
            for kind in ("prompt", "generated"):
                self._adapter_tokens.remove(label, kind)
        for name in usage.names:
            if not self._has_room():
                break
            self._add_label(name)
        self._mirror.usage = usage

    def _has_room(self) -> bool:
        return len(self._labels) < MAX_ADAPTER_LABELS + 3

    def _add_label(self, label: str) -> None:
        self._labels.add(label)
        self._adapter_requests.labels(label)
        for kind in ("prompt", "generated"):
            self._adapter_tokens.labels(label, kind)

    def update(self, stats: Mapping[str, float]) -> None:
        """Mirror the engine's own counts; cheap, and safe from any thread.

        Args:
            stats: values by the keys of `GAUGES`, `COUNTERS` and `TIERED`; any may be left out.

        Raises:
            KeyError: a key that no metric has.
        """
        if unknown := stats.keys() - GAUGES.keys() - COUNTERS.keys() - TIERED.keys():
            raise KeyError(f"no metric mirrors {sorted(unknown)}")
        self._mirror.stats = dict(stats)

    def render(self) -> bytes:
        """All metrics as `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class _Mirror(Collector):
    """Turns the last mapping into metrics; a key that is not in it has no sample."""

    def __init__(self) -> None:
        self.stats: Mapping[str, float] = {}
        self.usage: AdapterUsage | None = None

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        for key, (name, text) in GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(f"polypeft_{name}", text, value=stats[key])
        for key, (name, text) in COUNTERS.items():
            if key in stats:
                yield CounterMetricFamily(f"polypeft_{name}", text, value=stats[key])
        for family, text in _TIERED_HELP.items():
            metric = GaugeMetricFamily(f"polypeft_{family}", text, labels=["tier"])
            for key, (name, tier) in TIERED.items():
                if name == family and key in stats:
                    metric.add_metric([tier], stats[key])
            if metric.samples:
                yield metric
        if self.usage is not None:
            yield from _adapter_metrics(self.usage)


def _adapter_metrics(usage: AdapterUsage) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "polypeft_registered_adapters", "Names of adapters.", value=len(usage.names)
    )
    yield GaugeMetricFamily(
        "polypeft_pinned_adapters", "Names of adapters that are pinned.", value=usage.num_pinned
    )
    tiers = GaugeMetricFamily(
        "polypeft_adapters", "Adapters by the fastest tier they lie on.", labels=["tier"]
    )
    for tier, num_adapters in usage.num_by_tier.items():
        tiers.add_metric([tier], num_adapters)
    yield tiers
    # vLLM's gauge, which routers read: names in the labels, the time as the value. One sample,
    # where vLLM keeps one for every combination that there ever was.
    lora = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Running stats on lora requests.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    labels = [str(usage.max_resident), ",".join(usage.running), ",".join(usage.waiting)]
    lora.add_metric(labels, time.time())
    yield lora
