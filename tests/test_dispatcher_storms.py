"""Everything at once: callers leave, time runs out, replicas die, hang, come and evict; every row has one answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRejected, DeadlineExceeded, Overloaded, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.dispatcher import Dispatcher
from adapter_router.routing.replica_state import Member
from adapter_router.types import AdapterVersion, ReplicaLoad, ResidencyChange, Row, RowOutcome, RowResult, ShardReply
from tests.test_dispatcher import run, until, version

_ROOM = 4  # adapters that a replica holds
_REFUSED = "a7"


class Storm:
    """Replicas with little room; what goes wrong with them is drawn from ``chance``."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.living = ["r0", "r1", "r2"]
        self.held: dict[str, list[str]] = {}
        self.revision = 0
        self.num_replicas = 3

    def members(self) -> list[Member]:
        return [Member(name, name) for name in self.living]

    async def warm(self, replica: str, wanted: AdapterVersion) -> None:
        await asyncio.sleep(0.005)
        self.held.setdefault(replica, []).append(wanted.digest)

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], _: int
    ) -> ShardReply:
        held = self.held.setdefault(replica, [])
        for digest in {each.digest for each in versions if each and each.adapter != _REFUSED} - set(held):
            await asyncio.sleep(0.01)
            held.append(digest)
            del held[:-_ROOM]
        await asyncio.sleep(0.002 + 0.0002 * len(rows))
        fate = self.chance.random()
        if fate < 0.02:
            await asyncio.sleep(0.3)  # it hangs for a while
        if fate > 0.98 or replica not in self.living:
            self.kill(replica)
            raise ReplicaLost(f"{replica} is gone")
        self.revision += 1
        change = ResidencyChange(self.revision, frozenset(held), complete=True)
        return ShardReply(replica, [self._answer(row) for row in rows], change, ReplicaLoad())

    def kill(self, replica: str) -> None:
        if replica in self.living:
            self.living.remove(replica)
            self.living.append(f"r{self.num_replicas}")
            self.num_replicas += 1

    def _answer(self, row: Row) -> RowOutcome:
        if row.adapter == _REFUSED:
            return AdapterRejected("it cannot be served")
        output: Any = {"label": str(row.inputs), "score": 1.0, "probs": [1.0], "num_classes": 1}
        return RowResult(output, np.zeros(1), row.adapter, "v", 1)


def _check(row: Row, outcome: RowOutcome) -> None:
    if isinstance(outcome, RowResult):
        output: Any = outcome.output
        assert output["label"] == row.inputs and outcome.adapter == row.adapter != _REFUSED
    elif row.adapter == _REFUSED:
        assert isinstance(outcome, AdapterRejected | DeadlineExceeded | Overloaded)
    else:
        assert isinstance(outcome, DeadlineExceeded | Overloaded | ReplicaLost), outcome
        assert row.timeout_s is not None or isinstance(outcome, ReplicaLost | Overloaded), "in a minute?"


@pytest.mark.parametrize("seed", range(8))
def test_every_row_has_one_answer_and_nothing_is_left_behind(seed: int) -> None:
    chance = random.Random(seed)
    storm, outcomes = Storm(chance), Counter[str]()

    async def caller(router: Dispatcher, number: int) -> None:
        for turn in range(12):
            sent = []
            for index in range(chance.randint(1, 6)):
                adapter = f"a{int(chance.paretovariate(0.7)) % 12}"
                row = Row(
                    f"{number}-{turn}-{index}",
                    adapter,
                    tenant=f"t{number % 3}",
                    priority=chance.randint(-1, 1),
                    timeout_s=chance.choice((None, None, 0.05, 2.0)),
                )
                sent.append((row, version(adapter)))
            call = asyncio.ensure_future(router.submit(sent, together=chance.random() < 0.2))
            if chance.random() < 0.1:
                await asyncio.sleep(0.005)
                call.cancel()
                await asyncio.wait([call])
                continue
            for (row, _), outcome in zip(sent, await call, strict=True):
                outcomes[type(outcome).__name__] += 1
                _check(row, outcome)

    async def scenario() -> None:
        config = RoutingConfig(max_batch_rows=8, min_patience_s=0.05, max_queued_rows=2000, warm_up_s=0.1)
        router = Dispatcher(storm, config, RouterMetrics())
        await asyncio.gather(*(caller(router, number) for number in range(24)))
        await until(lambda: not router._placement._calls._calls)
        assert len(router) == 0 and router.load().open_tokens == 0
        for state in router.fleet.states():
            assert (state.queued, state.in_flight, state.warm_calls, dict(state.loading)) == (0, 0, 0, {})
        assert router._accounts._admission._tenants == {} and router._accounts._admission._total.rows == 0
        assert outcomes["RowResult"] > 300, outcomes
        await router.close()

    run(scenario())
