"""Bounded series that lose nothing, and one exposition for many processes."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from adapter_router.metrics import OTHER, EngineMetrics, RouterMetrics, TopSeries, exposition, merged_exposition


def series(registry: CollectorRegistry) -> dict[str, float]:
    return {s.labels["adapter"]: s.value for f in registry.collect() for s in f.samples if s.name.endswith("_total")}


def test_top_series_is_bounded_never_falls_and_loses_nothing() -> None:
    registry = CollectorRegistry()
    top = TopSeries(Counter("rows", "rows", ["adapter"], registry=registry), capacity=10)
    rng = np.random.default_rng(0)
    last: dict[str, float] = {}
    for count in range(1, 5001):
        top.inc(f"a{rng.zipf(1.3) % 500}")
        now = series(registry)
        assert len(now) <= 11
        assert sum(now.values()) == count
        assert now.get(OTHER, 0) >= last.get(OTHER, 0)
        last = now
    busiest = {f"a{i}" for i in (1, 2, 3)}
    assert busiest <= set(last), "the busiest adapters have series of their own"


def test_a_quiet_adapter_gives_way_to_one_that_becomes_busy() -> None:
    registry = CollectorRegistry()
    top = TopSeries(Counter("rows", "rows", ["adapter"], registry=registry), capacity=2)
    for name in ("early", "early", "quiet"):
        top.inc(name)
    for _ in range(10):
        top.inc("late")
    assert set(series(registry)) == {"early", "late", OTHER}


def test_an_adapter_may_be_called_as_the_rest_is() -> None:
    registry = CollectorRegistry()
    top = TopSeries(Counter("rows", "rows", ["adapter"], registry=registry), capacity=1)
    for count, name in enumerate((OTHER, "busy", "busy", "late", "late", "late", OTHER), 1):
        top.inc(name)
        assert sum(series(registry).values()) == count
    assert set(series(registry)) == {"late", OTHER}


def test_merged_exposition_tells_processes_apart() -> None:
    engines = {"replica:a": EngineMetrics(), "replica:b": EngineMetrics()}
    engines["replica:a"].loaded(0.2)
    engines["replica:b"].hits.inc(5)
    router = RouterMetrics()
    router.adapter_rows.inc('na"me\n', 3)
    texts = {name: exposition(metrics.registry) for name, metrics in engines.items()}
    text = merged_exposition({**texts, "router": exposition(router.registry)})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    loads = {s.labels["process"]: s.value for s in families["adapter_router_adapter_loads"].samples}
    assert loads == {"replica:a": 1.0, "replica:b": 0.0}
    assert families["adapter_router_adapter_load_seconds"].type == "histogram"
    (rows,) = families["adapter_router_adapter_rows"].samples
    assert rows.labels == {"adapter": 'na"me\n', "process": "router"} and rows.value == 3
    assert text.count("# TYPE adapter_router_adapter_loads_total") == 1
