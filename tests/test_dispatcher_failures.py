"""The dispatcher when time runs out, callers go, and replicas hang, come and leave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapter_router.errors import DeadlineExceeded
from adapter_router.metrics import RouterMetrics
from adapter_router.types import AdapterVersion, ReplicaLoad, ResidencyChange, Row, RowResult, ShardReply
from tests.test_dispatcher import ANSWER, Replicas, Sending, dispatcher, labels, rows, run, version


class Hanging(Replicas):
    """Replicas of which some do not answer while they are in ``stopped``; cancelled calls are noted."""

    def __init__(self, *names: str, **more: Any) -> None:
        super().__init__(*names, **more)
        self.stopped: set[str] = set()
        self.go_on = asyncio.Event()
        self.cancelled: list[str] = []

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply:
        try:
            if replica in self.stopped:
                self.calls.append((replica, list(rows)))
                await self.go_on.wait()
                self.calls.pop()
            return await super().send(replica, rows, versions, known)
        except asyncio.CancelledError:
            self.cancelled.append(replica)
            raise


def _row(text: str, adapter: str | None = None, **more: Any) -> tuple[Row, AdapterVersion | None]:
    return Row(text, adapter, **more), version(adapter) if adapter else None


def test_no_row_waits_longer_than_it_may() -> None:
    async def scenario() -> None:
        replicas, metrics = Hanging("r0"), RouterMetrics()
        router = dispatcher(replicas, metrics, calls_per_replica=1)
        replicas.stopped = {"r0"}
        start = asyncio.get_running_loop().time()
        stuck = asyncio.create_task(router.submit([_row("sent", timeout_s=0.2)]))
        await asyncio.sleep(0.05)
        late = await router.submit([_row("waits", timeout_s=0.1), _row("waits, too", timeout_s=0.15)])
        assert [type(outcome) for outcome in [*late, *await stuck]] == [DeadlineExceeded] * 3
        assert asyncio.get_running_loop().time() - start < 1.0
        assert len(router) == 0 and router.load().open_tokens == 0
        assert router.load().missed_s > 0
        errors = metrics.registry.get_sample_value("adapter_router_row_errors_total", {"code": "deadline_exceeded"})
        assert errors == 3
        await router.close()

    run(scenario())


def test_the_replica_is_told_how_much_time_is_left() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", seconds=0.1)
        router = dispatcher(replicas, calls_per_replica=1, batch_wait_s=0.0, timeout_s=30)
        first = asyncio.create_task(router.submit([_row("first")]))
        await asyncio.sleep(0.02)
        await router.submit([_row("second", timeout_s=5)])
        await first
        given = [row.timeout_s for _, sent in replicas.calls for row in sent]
        assert 29 < given[0] <= 30 and 4 < given[1] < 4.95  # type: ignore[operator]
        await router.close()

    run(scenario())


def test_a_call_that_nobody_waits_for_is_taken_back() -> None:
    async def scenario() -> None:
        replicas = Hanging("r0")
        router = dispatcher(replicas)
        replicas.stopped = {"r0"}
        callers = [asyncio.create_task(router.submit([_row(text)])) for text in "ab"]
        await asyncio.sleep(0.05)
        assert len(replicas.calls) == 1
        callers[0].cancel()
        await asyncio.sleep(0.02)
        assert not replicas.cancelled, "somebody still waits"
        callers[1].cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await asyncio.sleep(0.02)
        assert replicas.cancelled == ["r0"]
        assert [(s.rows, s.warm_calls) for s in router.fleet.states()] == [(0, 0)]
        await router.close()

    run(scenario())


def test_rows_of_a_replica_that_hangs_are_answered_by_another() -> None:
    async def scenario() -> None:
        replicas, metrics = Hanging("r0", "r1", seconds=0.005), RouterMetrics()
        router = dispatcher(replicas, metrics, min_patience_s=0.1)
        await asyncio.gather(*(router.submit(rows(20, 10)) for _ in range(5)))
        replicas.stopped = {"r0"}
        outcomes = await asyncio.gather(*(router.submit(rows(20, 10)) for _ in range(5)))
        assert all(isinstance(outcome, RowResult) for group in outcomes for outcome in group)
        state = router.fleet.get("r0")
        assert state is not None and state.suspect
        before = len([replica for replica, _ in replicas.calls if replica == "r0"])
        assert labels(await router.submit(rows(10, 10))) == [str(i) for i in range(10)]
        assert len([replica for replica, _ in replicas.calls if replica == "r0"]) == before, "it gets no rows"
        replicas.stopped = set()
        replicas.go_on.set()
        await asyncio.sleep(0.1)
        assert not state.suspect, "it has answered"
        assert [(s.rows, s.warm_calls) for s in router.fleet.states()] == [(0, 0), (0, 0)]
        await router.close()

    run(scenario())


def test_few_rows_are_sent_again_when_everything_is_slow() -> None:
    async def scenario() -> None:
        replicas, metrics = Replicas("r0", "r1", seconds=0.05), RouterMetrics()
        router = dispatcher(replicas, metrics, min_patience_s=0.02, patience=1, max_batch_rows=4)
        waves = [await asyncio.gather(*(router.submit(rows(8, 4)) for _ in range(20))) for _ in range(8)]
        assert all(isinstance(outcome, RowResult) for wave in waves for group in wave for outcome in group)
        sent, asked = sum(len(sent) for _, sent in replicas.calls), 8 * 20 * 8
        assert asked < sent <= asked * 1.1 + 256 + 10 * 30, (sent, asked)
        await router.close()

    run(scenario())


def test_what_waits_for_a_replica_that_leaves_goes_to_another() -> None:
    async def scenario() -> None:
        replicas = Hanging("r0")
        router = dispatcher(replicas, calls_per_replica=1, max_batch_rows=2)
        replicas.stopped = {"r0"}
        pending = [asyncio.create_task(router.submit([_row(str(number))])) for number in range(6)]
        await asyncio.sleep(0.05)
        replicas.living, replicas.resident["r1"] = ["r1"], set()
        done, waiting = await asyncio.wait(pending, timeout=0.3)
        assert len(done) == 4 and len(waiting) == 2, "what it runs it may finish"
        replicas.go_on.set()
        assert [labels(await each)[0] for each in pending] == [str(number) for number in range(6)]
        await router.close()

    run(scenario())


class Warming(Replicas):
    """Replicas that note what they load beforehand; with ``stuck`` they never do."""

    stuck = False

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.warmed: list[str] = []

    async def warm(self, replica: str, wanted: AdapterVersion) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        self.warmed.append(wanted.adapter)
        await super().warm(replica, wanted)
        assert replica not in [called for called, _ in self.calls]


def test_a_new_replica_holds_what_is_asked_for_before_it_gets_rows() -> None:
    async def scenario() -> None:
        replicas = Warming("r0")
        router = dispatcher(replicas)
        await asyncio.gather(*(router.submit(rows(40, 20)) for _ in range(3)))
        assert replicas.warmed == [], "nobody else was there to take its rows meanwhile"
        replicas.resident["r1"] = set()
        replicas.living.append("r1")
        while not (state := router.fleet.get("r1")) or not state.admitted:
            await router.submit(rows(20, 20))
        assert 3 < len(replicas.warmed) < 17, "its half"
        assert state.resident >= {f"sha256:{name}" for name in replicas.warmed}
        replicas.calls.clear()
        await asyncio.gather(*(router.submit(rows(40, 20)) for _ in range(20)))
        moved = {row.adapter for replica, sent in replicas.calls if replica == "r1" for row in sent}
        assert moved, "it takes part"
        await router.close()

    run(scenario())


def test_a_new_replica_that_cannot_warm_up_gets_rows_all_the_same() -> None:
    async def scenario() -> None:
        replicas = Warming("r0")
        replicas.stuck = True
        router = dispatcher(replicas, warm_up_s=0.1)
        await router.submit(rows(40, 20))
        replicas.resident["r1"] = set()
        replicas.living.append("r1")
        while not (state := router.fleet.get("r1")) or not state.admitted:
            await router.submit(rows(2, 2))
        await router.close()

    run(scenario())


def test_one_text_for_many_adapters_runs_on_one_replica() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", "r1")
        router = dispatcher(replicas)
        await router.home("sha256:a0")
        for adapter in range(6):
            for replica in ("r0", "r1") if adapter % 2 else ("r0",):
                replicas.resident[replica].add(f"sha256:a{adapter}")
                router.fleet.loaded(replica, f"sha256:a{adapter}")
        assert labels(await router.submit(rows(6, 6), together=True)) == [str(i) for i in range(6)]
        assert [replica for replica, _ in replicas.calls] == ["r0"], "the one that has all"
        await router.close()

    run(scenario())


def test_rows_of_other_routers_count() -> None:
    async def scenario() -> None:
        busy = {"r0": 500, "r1": 0}

        async def send(replica: str, sent: Sequence[Row], *_: object) -> ShardReply:
            answers = [RowResult(ANSWER, np.zeros(1), "a", "v", 1) for _ in sent]
            return ShardReply(replica, [*answers], ResidencyChange(0), ReplicaLoad(rows=busy[replica]))

        router = dispatcher(Sending(send, "r0", "r1"))
        used = []
        for _ in range(20):
            (outcome,) = await router.submit([_row("x")])
            assert isinstance(outcome, RowResult)
            used.append(outcome.replica)
        assert used.count("r0") <= 1, "of its first reply on, r0 is known to be full"
        await router.close()

    run(scenario())
