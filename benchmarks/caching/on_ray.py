"""The contenders as real Ray Serve deployments, each asked from this process as from a router's."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from adapter_router.config import RoutingConfig
from adapter_router.metrics import RouterMetrics
from adapter_router.types import BaseInfo, Row, RowResult
from benchmarks.caching.callers import CALLERS, Ask, Figures, closed_loop, figures
from benchmarks.caching.choices import bounded_rendezvous, version
from benchmarks.caching.multiplexed import Multiplexed
from benchmarks.caching.replicas import Sleeping
from benchmarks.caching.tally import REPLICAS, Tally
from deployments import replica_view
from deployments.pool import Pool

_TOLD_S = 0.5  # in which Serve has passed on that no model is loaded any more
_TIMEOUT_S = 120.0
_CONSISTENT = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_PINNED = "deployments.request_router:PinnedRequestRouter"
_BASE = BaseInfo("none", "none", "none", ("text-classification",), None, 1)


def deploy() -> Mapping[str, DeploymentHandle]:
    """Replicas of every contender, ready to be measured."""
    targets = {
        "multiplexed": _application(Multiplexed, None),
        "consistent_hash": _application(Multiplexed, _CONSISTENT),
        "rendezvous": _application(Multiplexed, _PINNED),
        "lru": _application(Sleeping, _CONSISTENT, False),
        "ours": _application(Sleeping, _PINNED, True),
    }
    runs = [serve.RunTarget(app, name, None) for name, app in targets.items()]
    handles = dict(zip(targets, serve.run_many(runs), strict=True))
    for name, handle in handles.items():
        _wait_for_replicas(handle, pinned=name in ("rendezvous", "ours"))
    return handles


def measure(contender: str, handle: DeploymentHandle, trace: Sequence[str]) -> Figures:
    """One contender's figures for one trace, its caches empty at the start."""
    handle.broadcast("forget").results(timeout_s=_TIMEOUT_S)
    time.sleep(_TOLD_S)
    answered, seconds = asyncio.run(_measured(_WAYS_TO_ASK[contender](handle), trace))
    return figures(answered, seconds, _tallies(handle))


async def _measured(
    way: AbstractAsyncContextManager[Ask], trace: Sequence[str]
) -> tuple[list[tuple[str, float]], float]:
    async with asyncio.timeout(_TIMEOUT_S), way as ask:
        return await closed_loop(ask, trace)


@asynccontextmanager
async def _multiplexed(handle: DeploymentHandle) -> Any:
    async def ask(adapter: str) -> None:
        await handle.options(method_name="answer", multiplexed_model_id=adapter).remote(adapter)

    yield ask


@asynccontextmanager
async def _session(handle: DeploymentHandle) -> Any:
    async def ask(adapter: str) -> None:
        await handle.options(method_name="answer", session_id=adapter).remote(adapter)

    yield ask


@asynccontextmanager
async def _rendezvous(handle: DeploymentHandle) -> Any:
    in_flight = Counter(dict.fromkeys(_living(handle), 0))

    async def ask(adapter: str) -> None:
        replica = bounded_rendezvous(adapter, in_flight)
        in_flight[replica] += 1
        await handle.options(method_name="answer", session_id=replica).remote(adapter)
        in_flight[replica] -= 1

    yield ask


@asynccontextmanager
async def _ours(handle: DeploymentHandle) -> Any:
    pool = Pool(handle, _BASE, RoutingConfig(), RouterMetrics())

    async def ask(adapter: str) -> None:
        (outcome,) = await pool.dispatcher.submit([(Row("", adapter), version(adapter))])
        assert isinstance(outcome, RowResult), outcome

    yield ask
    await pool.dispatcher.close()


_WAYS_TO_ASK: Mapping[str, Callable[[DeploymentHandle], AbstractAsyncContextManager[Ask]]] = {
    "multiplexed": _multiplexed,
    "consistent_hash": _session,
    "rendezvous": _rendezvous,
    "lru": _session,
    "ours": _ours,
}


def _application(replica: type, router: str | None, *args: Any) -> Any:
    options: dict[str, Any] = (
        {"request_router_config": RequestRouterConfig(request_router_class=router)} if router else {}
    )
    deployment = serve.deployment(
        num_replicas=REPLICAS,
        max_ongoing_requests=CALLERS,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        **options,
    )(replica)
    return deployment.bind(*args)


def _tallies(handle: DeploymentHandle) -> list[Tally]:
    tallies: list[Tally] = handle.broadcast("tally").results(timeout_s=_TIMEOUT_S)
    return tallies


def _living(handle: DeploymentHandle) -> tuple[str, ...]:
    return tuple(member.replica for member in replica_view.members(handle.app_name, handle.deployment_name))


def _wait_for_replicas(handle: DeploymentHandle, *, pinned: bool) -> None:
    """Until this process knows all replicas; where calls are ``pinned``, by name."""
    deadline = time.monotonic() + _TIMEOUT_S
    while len(_tallies(handle)) < REPLICAS or (pinned and len(_living(handle)) < REPLICAS):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{handle.app_name} has too few replicas")
        time.sleep(0.05)
