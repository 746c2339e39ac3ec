"""``adapter-router demo``: serve ten tenants on two bases, show mixed answers, and prove them right on the spot."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import transformers
from ray import serve

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Inputs, Row, RowOutcome, RowResult
from deployments.app import APP_NAME, AdapterArgs, AppArgs, BaseArgs
from deployments.demo.load import CALLERS, SECONDS, measure_load
from deployments.demo.show import alike, ask_over_http, expect, print_table
from deployments.demo.tenants import BASE, BASE_SHA256, IMAGE_TENANTS, TEXT_TENANTS, VISION_BASE, Tenant
from deployments.local import deploy, local_ray

_RESULT_TIMEOUT_S = 120.0
_EXACT = 1e-4


class Caller:
    """Another Ray application: asks ours through handles, as any service of yours would."""

    async def __call__(self, app: str, rows: Sequence[Row]) -> list[RowOutcome]:
        outcomes: list[RowOutcome] = await serve.get_app_handle(app).infer_many.remote(rows)
        return outcomes


def run_demo(port: int) -> bool:
    """The whole demo; True when every check held."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    steps = _Steps()
    with TemporaryDirectory(prefix="adapter-router-demo-") as store:
        steps.say("starting a local Ray (nothing leaves this machine)")
        with local_ray(port):
            steps.say(
                "starting 2 replicas of MiniLM (its digest is checked), 1 of a tiny ViT, and 10 adapters of 5 tasks"
            )
            deploy(_args(store))
            http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            caller = _start_caller()
            rows = _rows((*TEXT_TENANTS, *IMAGE_TENANTS))
            steps.say(f"sending {len(rows)} rows of 10 tenants on 2 bases, mixed, over HTTP and through a handle")
            answers = ask_over_http(http, rows)
            mixed = [expect(o) for o in caller.remote(APP_NAME, rows).result(timeout_s=_RESULT_TIMEOUT_S)]
            print_table(rows, mixed)
            same = all(alike(result.output, answer) for result, answer in zip(mixed, answers, strict=True))
            steps.say("asking each adapter alone, on a fresh base of its own")
            worst = max(
                _largest_difference(base, tenants, rows, mixed)
                for base, tenants in ((BASE, TEXT_TENANTS), (VISION_BASE, IMAGE_TENANTS))
            )
            steps.say(f"{CALLERS} callers for {SECONDS:.0f} s")
            load = measure_load(caller, http, _rows(TEXT_TENANTS), len(TEXT_TENANTS))
    print(f"\n  HTTP == handle       {'yes' if same else 'NO'}")
    print(f"  mixed == alone       {'yes' if worst <= _EXACT else 'NO'}: largest difference of any logit {worst:.1e}")
    print(f"  throughput           {load}")
    print("\nKeep it running:       make serve      (or: adapter-router serve)")
    print("Ask it:                curl -s localhost:8000/v1/classify -H 'content-type: application/json' \\")
    print("""                         -d '{"model": "language", "input": "Guten Morgen"}'""")
    print("Check your adapter:    adapter-router doctor DIR --base BASE")
    print('Add it:                POST /v1/load_lora_adapter {"lora_name": …, "lora_path": …}; see README.md')
    return same and worst <= _EXACT


def _args(store: str) -> AppArgs:
    return AppArgs(
        base=BASE,
        base_sha256=BASE_SHA256,
        num_threads=1,
        replicas=2,
        more_bases=[BaseArgs(base=VISION_BASE, num_threads=1)],
        store_dir=store,
        adapters=[AdapterArgs(name=tenant.name, path=tenant.path) for tenant in (*TEXT_TENANTS, *IMAGE_TENANTS)],
    )


def _start_caller() -> serve.handle.DeploymentHandle:
    options = {"name": "caller", "max_ongoing_requests": 2 * CALLERS, "ray_actor_options": {"num_cpus": 0.1}}
    return serve.run(serve.deployment(Caller, **options).bind(), name="second-app", route_prefix=None)


def _rows(tenants: Sequence[Tenant]) -> list[Row]:
    """Every tenant's samples, taken in turn."""
    own: list[list[Inputs]] = [[*t.samples, *(image for image, _ in t.images)] for t in tenants]
    turns = range(max(len(samples) for samples in own))
    return [
        Row(samples[turn], tenant.name)
        for turn in turns
        for tenant, samples in zip(tenants, own, strict=True)
        if turn < len(samples)
    ]


class _Steps:
    """Progress with the time since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:5.1f} s] {text}", flush=True)


def _largest_difference(base: str, tenants: Sequence[Tenant], rows: Sequence[Row], mixed: Sequence[RowResult]) -> float:
    """Largest |Δlogit| between the mixed answers and each adapter in an engine that knows no other."""
    worst = 0.0
    for tenant in tenants:
        with Engine(EngineConfig(base=base, device="cpu", num_threads=1)) as engine:
            engine.load_adapter(tenant.name, tenant.path)
            for row, result in zip(rows, mixed, strict=True):
                if row.adapter == tenant.name:
                    alone = expect(engine.infer([row])[0])
                    worst = max(worst, float(np.abs(alone.logits - result.logits).max()))
    return worst
