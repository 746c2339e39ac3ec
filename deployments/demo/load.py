"""The demo's load: many callers through a handle for some seconds, and what the metrics say about it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.handle import DeploymentHandle

from adapter_router.types import Row
from deployments.app import APP_NAME
from deployments.demo.show import expect

SECONDS = 5.0
CALLERS = 32
_ROWS_PER_CALL = 4
_RESULT_TIMEOUT_S = 120.0


def measure_load(caller: DeploymentHandle, http: httpx.Client, rows: Sequence[Row], num_adapters: int) -> str:
    """One line of figures."""
    before = _counters(http)
    stop = time.perf_counter() + SECONDS

    def call(number: int) -> int:
        sent = 0
        for index in itertools.count(number):
            if time.perf_counter() > stop:
                break
            call_rows = [rows[(index + step) % len(rows)] for step in range(_ROWS_PER_CALL)]
            outcomes = caller.remote(APP_NAME, call_rows).result(timeout_s=_RESULT_TIMEOUT_S)
            sent += len([expect(outcome) for outcome in outcomes])
        return sent

    with ThreadPoolExecutor(CALLERS) as callers:
        sent = sum(callers.map(call, range(CALLERS)))
    after = {name: value - before[name] for name, value in _counters(http).items()}
    hits = after["cache_hits_total"] / (after["cache_hits_total"] + after["cache_misses_total"])
    adapters = after["batch_adapters_sum"] / after["batches_total"]
    return (
        f"{sent / SECONDS:.0f} rows/s on {CALLERS} callers, {_ROWS_PER_CALL} rows a call; "
        f"{adapters:.1f} of {num_adapters} adapters in the average batch; cache hit rate {hits:.1%}"
    )


def _counters(http: httpx.Client) -> dict[str, float]:
    totals = dict.fromkeys(("batches_total", "batch_adapters_sum", "cache_hits_total", "cache_misses_total"), 0.0)
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("adapter_router_")
            if name in totals:
                totals[name] += sample.value
    return totals
