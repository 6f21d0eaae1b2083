"""What the server counts, in Prometheus' format. Knows nothing of HTTP or of the engine.

Two kinds of metric: events are recorded as they happen, by the methods; everything that the engine
keeps count of itself is mirrored from the mapping last given to `update`. Labels take few values:
routes, status codes, tiers; never a client's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


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
        self._mirror = _Mirror()
        self.registry.register(self._mirror)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered. `endpoint` is a route's pattern, not a client's path."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def prompt(self, num_tokens: int) -> None:
        """A prompt was taken in."""
        self._prompt_tokens.inc(num_tokens)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)

    def generated(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)

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
