"""What /metrics says, at one time. Reads Prometheus' text; asks nobody."""

from __future__ import annotations

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families


class Snapshot:
    """The samples of one scrape, by their full names: counters end in `_total`."""

    def __init__(self, text: str) -> None:
        """Raises ValueError: it is not Prometheus' text."""
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def get(self, name: str, **labels: str) -> float | None:
        """The sum of the samples that have these labels; None where there is none."""
        found = [
            value
            for has, value in self._samples.get(name, ())
            if all(has.get(key) == wanted for key, wanted in labels.items())
        ]
        return sum(found) if found else None

    def growth(self, before: Snapshot, name: str, **labels: str) -> float:
        """Of a counter, since an earlier scrape; what it is now where the server started anew."""
        now, then = self.get(name, **labels) or 0.0, before.get(name, **labels) or 0.0
        return now - then if now >= then else now


def share(part: float | None, whole: float | None) -> float | None:
    """part / whole; None where either is missing, or the whole is nothing."""
    return None if part is None or not whole else part / whole
