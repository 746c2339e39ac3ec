"""``adapter-router demo``: serve four tenants, show mixed answers, and prove them right on the spot."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import transformers
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowOutcome, RowResult
from deployments.app import APP_NAME, AdapterArgs, AppArgs
from deployments.demo.tenants import ADAPTERS, BASE, BASE_SHA256, SAMPLES
from deployments.local import deploy, local_ray

_LOAD_SECONDS = 5.0
_CALLERS = 32
_ROWS_PER_CALL = 4
_RESULT_TIMEOUT_S = 120.0


class Caller:
    """The second Ray application: asks the first one through a handle, as any service of yours would."""

    async def __call__(self, rows: Sequence[Row]) -> list[RowOutcome]:
        handle = serve.get_app_handle(APP_NAME)
        outcomes: list[RowOutcome] = await handle.infer_many.remote(rows)
        return outcomes


def run_demo(port: int) -> bool:
    """The whole demo; True when every check held."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    steps = _Steps()
    rows = [Row(text, tenant) for texts in zip(*SAMPLES.values(), strict=True) for text, tenant in zip(texts, SAMPLES)]  # noqa: B905
    with TemporaryDirectory(prefix="adapter-router-demo-") as store:
        steps.say("starting a local Ray (nothing leaves this machine)")
        with local_ray(port):
            steps.say("starting a router and 2 replicas of MiniLM (its digest is checked), loading 4 adapters")
            deploy(_demo_args(store))
            caller = serve.run(
                serve.deployment(
                    Caller, name="caller", max_ongoing_requests=2 * _CALLERS, ray_actor_options={"num_cpus": 0.1}
                ).bind(),
                name="second-app",
                route_prefix=None,
            )
            steps.say(f"serving on http://127.0.0.1:{port} - sending {len(rows)} rows of 4 tenants, mixed, over HTTP")
            http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            answers = _ask_over_http(http, rows)
            steps.say("sending the same rows as one batch from a second Ray application")
            mixed = [_expect(o) for o in caller.remote(rows).result(timeout_s=_RESULT_TIMEOUT_S)]
            _print_table(rows, mixed)
            same_labels = [answer["label"] for answer in answers] == [result.output["label"] for result in mixed]
            steps.say("asking each adapter alone, on a fresh base of its own")
            worst = _largest_difference(rows, mixed)
            steps.say(f"{_CALLERS} callers for {_LOAD_SECONDS:.0f} s")
            load = _measure_load(caller, http, rows)
    exact = worst <= 1e-4
    print(f"\n  HTTP == handle       {'yes' if same_labels else 'NO'}")
    print(f"  mixed == alone       {'yes' if exact else 'NO'}: largest difference of any logit {worst:.1e}")
    print(f"  throughput           {load}")
    print("\nKeep it running:       make serve      (or: adapter-router serve)")
    print("Ask it:                curl -s localhost:8000/v1/classify -H 'content-type: application/json' \\")
    print("""                         -d '{"model": "language", "input": "Guten Morgen"}'""")
    print('Add your own adapter:  POST /v1/load_lora_adapter {"lora_name": …, "lora_path": …}; see README.md')
    return same_labels and exact


def _demo_args(store: str) -> AppArgs:
    adapters = [AdapterArgs(name=name, path=path) for name, path in ADAPTERS.items()]
    return AppArgs(base=BASE, base_sha256=BASE_SHA256, num_threads=1, replicas=2, store_dir=store, adapters=adapters)


class _Steps:
    """Progress with the time since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:5.1f} s] {text}", flush=True)


def _ask_over_http(http: httpx.Client, rows: Sequence[Row]) -> list[dict[str, object]]:
    """One request a row, all at once: the router makes mixed batches of them."""

    def ask(row: Row) -> dict[str, object]:
        response = http.post("/v1/classify", json={"model": row.adapter, "input": row.inputs})
        (entry,) = response.raise_for_status().json()["data"]
        return dict(entry)

    with ThreadPoolExecutor(len(rows)) as callers:
        return list(callers.map(ask, rows))


def _print_table(rows: Sequence[Row], results: Sequence[RowResult]) -> None:
    print(f"\n  {'tenant':11} {'text':64} {'label':13} {'score':>5}  {'replica':9} version")
    for row, result in zip(rows, results, strict=True):
        label, score = result.output["label"], result.output["score"]
        version = result.version.removeprefix("sha256:")[:10]
        print(f"  {row.adapter:11} {row.inputs!s:64} {label:13} {score:5.2f}  {result.replica:9} {version}")
    print()


def _largest_difference(rows: Sequence[Row], mixed: Sequence[RowResult]) -> float:
    """Largest |Δlogit| between the mixed answers and each adapter in an engine that knows no other."""
    worst = 0.0
    for tenant, directory in ADAPTERS.items():
        with Engine(EngineConfig(base=BASE, device="cpu", num_threads=1)) as engine:
            engine.load_adapter(tenant, directory)
            for row, result in zip(rows, mixed, strict=True):
                if row.adapter == tenant:
                    alone = _expect(engine.infer([row])[0])
                    worst = max(worst, float(np.abs(alone.logits - result.logits).max()))
    return worst


def _measure_load(caller: DeploymentHandle, http: httpx.Client, rows: Sequence[Row]) -> str:
    before = _counters(http)
    stop = time.perf_counter() + _LOAD_SECONDS

    def call(number: int) -> int:
        sent = 0
        for index in itertools.count(number):
            if time.perf_counter() > stop:
                break
            call_rows = [rows[(index + step) % len(rows)] for step in range(_ROWS_PER_CALL)]
            outcomes = caller.remote(call_rows).result(timeout_s=_RESULT_TIMEOUT_S)
            sent += len([_expect(outcome) for outcome in outcomes])
        return sent

    with ThreadPoolExecutor(_CALLERS) as callers:
        sent = sum(callers.map(call, range(_CALLERS)))
    after = {name: value - before[name] for name, value in _counters(http).items()}
    hits = after["cache_hits_total"] / (after["cache_hits_total"] + after["cache_misses_total"])
    adapters = after["batch_adapters_sum"] / after["batches_total"]
    return (
        f"{sent / _LOAD_SECONDS:.0f} rows/s on {_CALLERS} callers, {_ROWS_PER_CALL} rows a call; "
        f"{adapters:.1f} of {len(ADAPTERS)} adapters in the average batch; cache hit rate {hits:.1%}"
    )


def _counters(http: httpx.Client) -> dict[str, float]:
    totals = dict.fromkeys(("batches_total", "batch_adapters_sum", "cache_hits_total", "cache_misses_total"), 0.0)
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("adapter_router_")
            if name in totals:
                totals[name] += sample.value
    return totals


def _expect(outcome: RowOutcome) -> RowResult:
    if not isinstance(outcome, RowResult):
        raise outcome
    return outcome
