"""What is left of the engine's throughput behind router, Ray and a client, and where the time of one call goes."""

from __future__ import annotations

import itertools
import pickle
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_router.config import EngineConfig, RoutingConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from benchmarks.harness import Result, interleaved, ratio, summary
from benchmarks.serving_peers.arrivals import TEXTS, draw
from benchmarks.serving_peers.systems import ours
from deployments.demo.tenants import BASE
from deployments.local import deploy

ROWS = 32  # of one call
_CALLS = 60  # of one round
_CALLERS = 4
_TIMEOUT_S = 120.0


def measure(directories: Mapping[str, Path], folder: Path, rounds: int) -> list[Result]:
    """Throughput of our application over that of its engine alone: one replica, one thread, the same calls."""
    name = "overhead"
    args = ours(directories, folder / "overhead-store", replicas=1)
    handle = deploy(args, name, f"/{name}")
    config = EngineConfig(
        base=BASE,
        device="cpu",
        num_threads=1,
        adapter_memory_bytes=args.adapter_memory_bytes,
        store_dir=folder / "engine",
    )
    calls = _calls(len(directories))
    with Engine(config) as engine, ThreadPoolExecutor(_CALLERS) as clients:
        for adapter, directory in directories.items():
            engine.load_adapter(adapter, directory)
        # A replica, too, tokenises one batch while it computes another.
        with ThreadPoolExecutor(RoutingConfig.calls_per_replica) as threads:
            contenders: dict[str, Callable[[], object]] = {
                "engine": lambda: list(threads.map(lambda rows: _checked(engine.infer(rows)), calls)),
                "app": lambda: list(clients.map(lambda rows: _ask(handle, rows), calls)),
            }
            seconds = interleaved(contenders, rounds)
        results = [ratio("overhead/32_rows_a_call", seconds["engine"], seconds["app"])]
        results += [
            summary(f"overhead/{who}", [_CALLS * ROWS / s for s in taken], "rows/s") for who, taken in seconds.items()
        ]
        results += _stages(handle, engine, calls)
    serve.delete(name)
    for result in results:
        print(f"  {result.name:40} {result.value:8.2f} {result.unit} ± {result.spread:.2f}", flush=True)
    return results


def _stages(handle: DeploymentHandle, engine: Engine, calls: Sequence[list[Row]]) -> list[Result]:
    """One caller and one call at a time, so that nothing waits for anything: milliseconds of each stage of a call.

    ``client_hop`` and ``replica_hop`` are Serve's handle calls, pickling and threads included, with what the router and
    the replica do around their own measurements; ``pickling`` is how much of both it is, measured here.
    """
    total, alone = [], []
    before = _sums(handle)
    for rows in calls:  # in turns, so that whatever else the machine does hits both alike
        total.append(_milliseconds(lambda rows=rows: _ask(handle, rows)))  # type: ignore[misc]
        alone.append(_milliseconds(lambda rows=rows: _checked(engine.infer(rows))))  # type: ignore[misc]
    after = _sums(handle)
    spent = {key: after[key] - before[key] for key in after}
    in_router = 1e3 * spent["row_seconds_sum"] / spent["row_seconds_count"]
    queued = 1e3 * spent["queue_seconds_sum"] / spent["queue_seconds_count"]
    forward = 1e3 * spent["forward_seconds_sum"] / len(calls)
    engine_ms = statistics.mean(alone)
    stages = {
        "total": statistics.mean(total),
        "client_hop": statistics.mean(total) - in_router,
        "router_queue": queued,
        "replica_hop": in_router - queued - engine_ms,
        "engine_forward": forward,
        "engine_rest": engine_ms - forward,
        "pickling": statistics.mean(_pickling(engine, rows) for rows in calls[:10]),
    }
    return [Result(f"overhead/stage/{stage}", value, "ms", 0.0) for stage, value in stages.items()]


def _pickling(engine: Engine, rows: list[Row]) -> float:
    """Of both hops there and back, in milliseconds: rows twice, answers twice, versions once."""
    outcomes = engine.infer(rows)
    report = [engine.residency() for _ in rows]  # of about the size of the versions that travel with the rows
    return 2 * _milliseconds(lambda: pickle.loads(pickle.dumps((rows, outcomes)))) + _milliseconds(
        lambda: pickle.loads(pickle.dumps(report))
    )


def _calls(adapters: int) -> list[list[Row]]:
    arrivals = draw("poisson", 2.0 * _CALLS * ROWS, 1.0, adapters, 1, 0)[: _CALLS * ROWS]
    rows = iter([Row(TEXTS[arrival.texts[0]], arrival.adapter) for arrival in arrivals])
    return [list(itertools.islice(rows, ROWS)) for _ in range(_CALLS)]


def _ask(handle: DeploymentHandle, rows: list[Row]) -> None:
    _checked(handle.infer_many.remote(rows).result(timeout_s=_TIMEOUT_S))


def _checked(outcomes: Sequence[object]) -> None:
    failed = [outcome for outcome in outcomes if not isinstance(outcome, RowResult)]
    assert not failed, failed[0]


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _sums(handle: DeploymentHandle) -> dict[str, float]:
    text = handle.metrics_text.remote().result(timeout_s=_TIMEOUT_S)
    names = [f"{which}_seconds_{what}" for which in ("row", "queue", "forward") for what in ("sum", "count")]
    totals = dict.fromkeys(names, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("adapter_router_")
            if name in totals:
                totals[name] += sample.value
    return totals
