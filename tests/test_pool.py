"""One base's replicas as a router sees them: new adapters are checked a few at once, and not without a replica."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from adapter_router.catalog.records import AdapterSpec
from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterUnavailable
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.replica_state import Member
from adapter_router.types import BaseInfo, Source
from deployments import replica_view
from deployments.pool import _CHECKS, Pool
from deployments.replica import MAX_CALLS

_SPEC = AdapterSpec("a", Source("/x"))


class Replicas:
    """A handle of replicas that check adapters when ``gate`` opens."""

    app_name = "pool"

    def __init__(self, *living: str) -> None:
        self.deployment_name = f"replicas-{id(self)}"
        self.gate = asyncio.Event()
        self.running = 0
        replica_view.publish(self.app_name, self.deployment_name, tuple(Member(name, name) for name in living))

    def options(self, **_: object) -> Any:
        return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(self._admit(*args)))

    async def _admit(self, *_: object) -> str:
        self.running += 1
        await self.gate.wait()
        self.running -= 1
        return "a report"


def _pool(replicas: Any) -> Pool:
    base = BaseInfo("base", "fingerprint", "bert", ("text-classification",), None, 512)
    return Pool(replicas, base, RoutingConfig(), RouterMetrics())


def _stored(number: int) -> Any:
    return SimpleNamespace(digest=f"sha256:{number:064x}")


def test_many_registrations_leave_room_for_rows() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0")
        pool = _pool(replicas)
        checks = [asyncio.create_task(pool.check(_SPEC, _stored(number), False)) for number in range(MAX_CALLS)]
        for _ in range(1000):
            await asyncio.sleep(0)
        assert replicas.running == _CHECKS <= MAX_CALLS // 4
        replicas.gate.set()
        assert await asyncio.gather(*checks) == ["a report"] * MAX_CALLS and replicas.running == 0
        await pool.dispatcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_without_a_replica_an_adapter_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.pool._HOME_S", 0.1)

    async def scenario() -> None:
        pool = _pool(Replicas())
        with pytest.raises(AdapterUnavailable, match="no replica of base base lives"):
            await pool.check(_SPEC, _stored(1), False)
        await pool.dispatcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
