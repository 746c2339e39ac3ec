"""Prometheus metrics. Every process owns a private registry; the router joins their texts into one exposition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from adapter_router.errors import AdapterRouterError

_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
OTHER = "__other__"


class EngineMetrics:
    """What one engine does: forwards, loads, evictions, residency."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = _counter(self, "engine_calls", "Batches of rows handed to the engine")
        self.forwards = _counter(self, "forwards", "Forward passes of the base model")
        self.forward_rows = _histogram(self, "forward_rows", "Rows in a forward pass", _ROW_BUCKETS)
        self.forward_adapters = _histogram(self, "forward_adapters", "Adapters in a forward pass", _ROW_BUCKETS)
        self.forward_seconds = _histogram(self, "forward_seconds", "Time of a forward pass", _SECONDS_BUCKETS)
        self.hits = _counter(self, "cache_hits", "Rows whose adapter was in memory when they arrived")
        self.misses = _counter(self, "cache_misses", "Rows that waited for their adapter")
        self.loads = _counter(self, "adapter_loads", "Adapters read, checked and converted")
        self.load_seconds = _histogram(
            self, "adapter_load_seconds", "Time to fetch, read, check and convert", _SECONDS_BUCKETS
        )
        self.load_failures = _counter(self, "adapter_load_failures", "Adapter loads that failed, by code", "code")
        self.promotions = _counter(self, "adapter_promotions", "Adapters brought to the device from host memory")
        self.evictions = _counter(self, "adapter_evictions", "Adapters evicted from the device to make room")
        self.rows_skipped = _counter(
            self, "rows_skipped", "Rows that nobody waited for any more when their turn came, by code", "code"
        )
        self.base_bytes = _gauge(self, "base_bytes", "Memory held by the base's parameters, quantised as they are")
        self.resident_bytes = _gauge(self, "resident_bytes", "Device memory held by resident adapters")
        self.resident_adapters = _gauge(self, "resident_adapters", "Adapters on the device")
        self.pinned_bytes = _gauge(self, "pinned_bytes", "Device memory held by pinned adapters")
        self.host_bytes = _gauge(self, "host_bytes", "Host memory held by adapters that are not on the device")
        self.host_adapters = _gauge(self, "host_adapters", "Adapters in host memory that are not on the device")

    def loaded(self, seconds: float) -> None:
        """One adapter was loaded."""
        self.loads.inc()
        self.load_seconds.observe(seconds)

    def load_failed(self, error: AdapterRouterError) -> None:
        """One load failed."""
        self.load_failures.labels(error.code).inc()

    def resident(self, num_bytes: int, num_adapters: int, pinned_bytes: int) -> None:
        """What is on the device now."""
        self.resident_bytes.set(num_bytes)
        self.resident_adapters.set(num_adapters)
        self.pinned_bytes.set(pinned_bytes)

    def host(self, num_bytes: int, num_adapters: int) -> None:
        """What is in host memory only."""
        self.host_bytes.set(num_bytes)
        self.host_adapters.set(num_adapters)


class RouterMetrics:
    """What one router does: rows, batches, waiting, errors, and traffic by adapter."""

    def __init__(self, max_adapter_series: int = 100) -> None:
        self.registry = CollectorRegistry()
        self.rows = _counter(self, "rows", "Rows accepted")
        self.batches = _counter(self, "batches", "Batches sent, each in one call of one replica")
        self.batch_rows = _histogram(self, "batch_rows", "Rows in a batch", _ROW_BUCKETS)
        self.batch_adapters = _histogram(self, "batch_adapters", "Distinct adapters in a batch", _ROW_BUCKETS)
        self.retried = _counter(self, "retried_rows", "Rows sent again because their replica was lost or late")
        self.suspicions = _counter(self, "replica_suspicions", "Times a replica was lost or did not answer in time")
        self.warmed = _counter(self, "warmed_adapters", "Adapters that new replicas loaded before they got rows")
        self.queue_seconds = _histogram(self, "queue_seconds", "Time a row waited for its batch", _SECONDS_BUCKETS)
        self.row_seconds = _histogram(self, "row_seconds", "Time from a row's arrival to its answer", _SECONDS_BUCKETS)
        self.errors = _counter(self, "row_errors", "Rows answered with an error, by code", "code")
        self.queued = _gauge(self, "queued_rows", "Rows waiting for a batch")  # its owner says how many
        self._adapter_rows = _counter(
            self, "adapter_rows", "Rows by adapter; the busiest have their own series", "adapter"
        )
        self.adapter_rows = TopSeries(self._adapter_rows, max_adapter_series)


class TopSeries:
    """A counter by label value that never has more than ``capacity`` series of its own, plus ``__other__``.

    Space-saving (Metwally et al. 2005): a newcomer takes the place of the quietest series once it has been seen as
    often. The total of a series that gives way moves to ``__other__``, so no series ever falls and none is lost.
    """

    def __init__(self, counter: Counter, capacity: int) -> None:
        self._counter = counter
        self._capacity = capacity
        self._totals: dict[str, float] = {}
        self._waiting: dict[str, float] = {}

    def inc(self, value: str, amount: float = 1.0) -> None:
        """Count ``amount`` for ``value``."""
        if value == OTHER:  # somebody's name may be that
            self._counter.labels(OTHER).inc(amount)
            return
        if value in self._totals or len(self._totals) < self._capacity:
            self._add(value, amount)
            return
        self._counter.labels(OTHER).inc(amount)
        seen = self._waiting[value] = self._waiting.get(value, 0.0) + amount
        quietest = min(self._totals, key=self._totals.__getitem__)
        if seen > self._totals[quietest]:
            self._counter.remove(quietest)
            self._counter.labels(OTHER).inc(self._totals.pop(quietest))
            del self._waiting[value]
            self._add(value, 0.0)
        elif len(self._waiting) > 10 * self._capacity:
            self._waiting.clear()

    def _add(self, value: str, amount: float) -> None:
        self._totals[value] = self._totals.get(value, 0.0) + amount
        self._counter.labels(value).inc(amount)


def exposition(registry: CollectorRegistry) -> str:
    """A registry's metrics in Prometheus' text format."""
    return generate_latest(registry).decode()


def merged_exposition(texts: Mapping[str, str]) -> str:
    """Expositions by process name -> one exposition whose samples carry ``process``, each family declared once."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return exposition(registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for process, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                if family.name.endswith("_created"):  # a by-product of the text format
                    continue
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
        return iter(families.values())


def _counter(owner: EngineMetrics | RouterMetrics, name: str, documentation: str, *labels: str) -> Counter:
    return Counter(f"adapter_router_{name}", documentation, labels, registry=owner.registry)


def _gauge(owner: EngineMetrics | RouterMetrics, name: str, documentation: str) -> Gauge:
    return Gauge(f"adapter_router_{name}", documentation, registry=owner.registry)


def _histogram(
    owner: EngineMetrics | RouterMetrics, name: str, documentation: str, buckets: tuple[float, ...]
) -> Histogram:
    return Histogram(f"adapter_router_{name}", documentation, buckets=buckets, registry=owner.registry)
