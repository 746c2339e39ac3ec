"""The dispatcher with replicas that are plain coroutines: batching, sharding, failures."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_router.config import RoutingConfig
from adapter_router.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.dispatcher import Dispatcher
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.types import AdapterVersion, ResidencyChange, Row, RowOutcome, RowResult, ShardReply

ANSWER: Any = {"label": "x", "score": 1.0, "probs": [1.0], "num_classes": 1}


def version(name: str) -> AdapterVersion:
    return AdapterVersion(name, f"sha256:{name}", Path("unused"), "text-classification", ("x",), "softmax")


class Replicas:
    """Replicas that answer after ``seconds``, hold what they have seen, and remember every call."""

    def __init__(self, *names: str, seconds: float = 0.02, load_seconds: float = 0.0) -> None:
        self.living = list(names)
        self.seconds = seconds
        self.load_seconds = load_seconds
        self.resident: dict[str, set[str]] = {name: set() for name in names}
        self.calls: list[tuple[str, list[Row]]] = []
        self.running: Counter[str] = Counter()
        self.dying: set[str] = set()

    def members(self) -> list[Member]:
        return [Member(name, name) for name in self.living]

    async def warm(self, replica: str, wanted: AdapterVersion) -> None:
        self.resident[replica].add(wanted.digest)

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], _: int
    ) -> ShardReply:
        self.calls.append((replica, list(rows)))
        self.running[replica] += 1
        digests = {entry.digest for entry in versions if entry}
        cold = digests - self.resident[replica]
        await asyncio.sleep(self.seconds + (self.load_seconds if cold else 0.0))
        self.running[replica] -= 1
        if replica in self.dying:
            raise ReplicaLost(f"{replica} is gone")
        self.resident[replica] |= digests
        return ShardReply(replica, [self._answer(row) for row in rows], self._residency(replica))

    def _residency(self, replica: str) -> ResidencyChange:
        return ResidencyChange(len(self.calls), frozenset(self.resident[replica]), complete=True)

    def _answer(self, row: Row) -> RowOutcome:
        if row.inputs == "bad":
            return InvalidRequest("bad row")
        if row.inputs == "crash":
            raise ValueError("a bug")
        output: Any = {"label": str(row.inputs), "score": 1.0, "probs": [1.0], "num_classes": 1}
        return RowResult(output, np.zeros(1), row.adapter, "v", 1)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def dispatcher(replicas: Replicas, metrics: RouterMetrics | None = None, **config: Any) -> Dispatcher:
    return Dispatcher(replicas, RoutingConfig(**config), metrics or RouterMetrics())


class Sending(Replicas):
    """Replicas whose answers are those of ``answer``."""

    def __init__(self, answer: Callable[..., Awaitable[ShardReply]], *names: str) -> None:
        super().__init__(*names)
        self.answer = answer

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply:
        return await self.answer(replica, rows, versions, known)


def rows(count: int, adapters: int) -> list[tuple[Row, AdapterVersion | None]]:
    return [(Row(str(i), f"a{i % adapters}"), version(f"a{i % adapters}")) for i in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError after 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nobody tells of these
            await asyncio.sleep(0.005)


def labels(outcomes: Sequence[RowOutcome]) -> list[str]:
    return [outcome.output["label"] if isinstance(outcome, RowResult) else outcome.code for outcome in outcomes]


def test_one_call_per_batch_and_replica_and_the_callers_order() -> None:
    async def scenario() -> None:
        replicas, metrics = Replicas("r0", "r1", "r2"), RouterMetrics()
        router = dispatcher(replicas, metrics, max_batch_rows=64)
        for adapter in range(12):  # spread residency
            home = await router.home(f"sha256:a{adapter}")
            replicas.resident[home].add(f"sha256:a{adapter}")
            router.fleet.loaded(home, f"sha256:a{adapter}")
        outcomes = await router.submit(rows(60, 12))
        assert labels(outcomes) == [str(i) for i in range(60)]
        used = [replica for replica, _ in replicas.calls]
        assert sorted(used) == sorted(set(used)) and len(used) == 3, "one batch: one call for each replica"
        for replica, sent in replicas.calls:
            assert {f"sha256:{row.adapter}" for row in sent} <= replicas.resident[replica]
        assert metrics.registry.get_sample_value("adapter_router_batches_total") == 3
        await router.close()

    run(scenario())


def test_rows_gather_while_replicas_are_busy() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", seconds=0.05)
        router = dispatcher(replicas, calls_per_replica=1, batch_wait_s=0.0, max_batch_rows=64)
        await asyncio.gather(*(router.submit([row]) for row in rows(8, 8)))  # make all resident
        replicas.calls.clear()

        async def arrive(index: int) -> None:
            await asyncio.sleep(index * 0.002)
            await router.submit([rows(8, 8)[index % 8]])

        await asyncio.gather(*(arrive(index) for index in range(100)))
        sizes = [len(sent) for _, sent in replicas.calls]
        assert max(sizes) > 15 and len(sizes) < 10, sizes
        assert replicas.running["r0"] == 0
        await router.close()

    run(scenario())


def test_a_cold_adapter_delays_nobody_else() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", load_seconds=1.0)
        replicas.resident["r0"] = {"sha256:warm"}
        router = dispatcher(replicas)
        await router.home("sha256:warm")
        router.fleet.loaded("r0", "sha256:warm")
        loop = asyncio.get_running_loop()
        start = loop.time()
        cold = asyncio.create_task(router.submit([(Row("cold", "cold"), version("cold"))]))
        together = asyncio.create_task(
            router.submit([(Row("w", "warm"), version("warm")), (Row("b"), None), (Row("w", "warm"), version("warm"))])
        )
        assert labels(await together) == ["w", "b", "w"]
        assert loop.time() - start < 0.5
        assert labels(await cold) == ["cold"]
        await router.close()

    run(scenario())


def test_rows_that_come_during_a_load_wait_for_it_and_start_no_other() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", "r1", seconds=0.2, load_seconds=0.3)
        router = dispatcher(replicas)
        pending = []
        for index in range(12):
            pending.append(asyncio.create_task(router.submit([(Row(str(index), "cold"), version("cold"))])))
            await asyncio.sleep(0.01)
        start = asyncio.get_running_loop().time()
        assert [labels(await task) for task in pending] == [[str(index)] for index in range(12)]
        assert len({replica for replica, _ in replicas.calls}) == 1
        assert asyncio.get_running_loop().time() - start < 1.0, "the others follow the first two at once"
        await router.close()

    run(scenario())


def test_a_stuck_load_leaves_room_for_the_others() -> None:
    async def scenario() -> None:
        calls = Counter[str]()

        async def send(replica: str, sent: Sequence[Row], *_: object) -> ShardReply:
            if sent[0].adapter == "stuck":
                calls["stuck"] += 1
                await asyncio.Event().wait()
            return ShardReply(replica, [RowResult(ANSWER, np.zeros(1), "a", "v", 1) for _ in sent], ResidencyChange(0))

        router = dispatcher(Sending(send, "r0"))
        stuck = []
        for _ in range(100):
            stuck.append(asyncio.create_task(router.submit([(Row("x", "stuck"), version("stuck"))])))
            await asyncio.sleep(0.003)  # each in a batch of its own
        (state,) = router.fleet.states()
        assert len(state.loading) == 1
        assert labels(await router.submit(rows(3, 3))) == ["x"] * 3
        assert calls["stuck"] == 1 and not any(task.done() for task in stuck)
        await router.close()
        for task in stuck:
            task.cancel()

    run(scenario())


def test_a_lost_replicas_rows_are_answered_elsewhere() -> None:
    async def scenario() -> None:
        replicas, metrics = Replicas("r0", "r1"), RouterMetrics()
        router = dispatcher(replicas, metrics)
        replicas.dying = {"r0"}
        outcomes = await router.submit(rows(40, 10))
        assert labels(outcomes) == [str(i) for i in range(40)]
        assert {o.replica for o in outcomes if isinstance(o, RowResult)} == {"r1"}
        answered = Counter(str(row.inputs) for replica, sent in replicas.calls if replica == "r1" for row in sent)
        assert set(answered.values()) == {1}
        assert metrics.registry.get_sample_value("adapter_router_retried_rows_total") > 0  # type: ignore[operator]
        await router.close()

    run(scenario())


def test_rows_go_to_no_replica_that_has_been_lost() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", "r1")
        router = dispatcher(replicas)
        replicas.dying = {"r0", "r1"}
        (outcome,) = await router.submit([(Row("x", "a", timeout_s=0.5), version("a"))])
        assert isinstance(outcome, DeadlineExceeded) and len(replicas.calls) == 2, "they wait for a new one"
        await router.close()

    run(scenario())


def test_rows_are_sent_three_times_at_most() -> None:
    async def scenario() -> None:
        replicas = Replicas(*(f"r{number}" for number in range(6)))
        router = dispatcher(replicas)
        replicas.dying = set(replicas.living)
        (outcome,) = await router.submit([(Row("x", "a"), version("a"))])
        assert isinstance(outcome, ReplicaLost) and len(replicas.calls) == 3, "it may be the row that kills them"
        await router.close()

    run(scenario())


def test_rows_wait_for_a_first_or_a_new_replica() -> None:
    async def scenario() -> None:
        replicas = Replicas()
        router = dispatcher(replicas)
        pending = asyncio.create_task(router.submit(rows(3, 3)))
        await asyncio.sleep(0.1)
        assert not pending.done()
        replicas.resident["late"] = set()
        replicas.living.append("late")
        assert labels(await pending) == ["0", "1", "2"]
        replicas.dying.add("late")
        pending = asyncio.create_task(router.submit(rows(3, 3)))
        await asyncio.sleep(0.2)
        replicas.resident["later"] = set()
        replicas.living[:] = ["later"]
        assert labels(await pending) == ["0", "1", "2"]
        await router.close()

    run(scenario())


def test_errors_stay_with_their_rows() -> None:
    async def scenario() -> None:
        router = dispatcher(Replicas("r0"))
        outcomes = await router.submit([(Row("good"), None), (Row("bad"), None), (Row("fine"), None)])
        assert labels(outcomes) == ["good", "invalid_request", "fine"]
        (crashed,) = await router.submit([(Row("crash"), None)])
        assert isinstance(crashed, InternalError) and "a bug" not in crashed.message
        assert labels(await router.submit([(Row("after"), None)])) == ["after"]
        await router.close()

    run(scenario())


def test_a_fault_in_dispatching_costs_one_batch_only() -> None:
    async def scenario() -> None:
        router = dispatcher(Replicas("r0"))
        broken: Any = AdapterVersion("a", ["unhashable"], Path("unused"), "text-classification", ("x",), "softmax")  # type: ignore[arg-type]
        (failed,) = await router.submit([(Row("x", "a"), broken)])
        assert isinstance(failed, InternalError)
        assert labels(await router.submit([(Row("after"), None)])) == ["after"]
        await router.close()

    run(scenario())


def test_a_full_queue_refuses_at_once() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", seconds=0.2)
        router = dispatcher(replicas, max_queued_rows=12, max_batch_rows=1, calls_per_replica=1)
        first = [asyncio.create_task(router.submit([(Row("0"), None)]))]
        first += [asyncio.create_task(router.submit([(Row(str(i)), None)])) for i in range(1, 6)]
        await asyncio.sleep(0.01)
        (refused,) = await router.submit([(Row("x"), None)])
        assert isinstance(refused, Overloaded) and refused.retryable, "half of the room is left for other tenants"
        other = asyncio.create_task(router.submit([(Row("other", tenant="other"), None)]))
        assert [labels(await task) for task in first] == [[str(i)] for i in range(6)]
        assert labels(await other) == ["other"]
        await router.close()

    run(scenario())


def test_rows_of_a_cancelled_caller_never_leave() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", seconds=0.1)
        router = dispatcher(replicas, calls_per_replica=1, batch_wait_s=0.0)
        busy = asyncio.create_task(router.submit([(Row("busy"), None)]))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(router.submit([(Row("gone"), None)]))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await busy
        assert labels(await router.submit([(Row("next"), None)])) == ["next"]
        assert [str(row.inputs) for _, sent in replicas.calls for row in sent] == ["busy", "next"]
        await router.close()

    run(scenario())


def test_load_counts_return_to_zero() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", "r1", seconds=0.001)
        router = dispatcher(replicas)
        await asyncio.gather(*(router.submit(rows(7, 5)) for _ in range(40)))
        counts = [(state.rows, state.warm_calls, len(state.loading)) for state in router.fleet.states()]
        assert counts == [(0, 0, 0), (0, 0, 0)]
        await router.close()

    run(scenario())


def test_a_replica_that_leaves_the_list_and_returns_is_counted_right() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", seconds=0.2)
        router = dispatcher(replicas)
        pending = asyncio.create_task(router.submit([(Row("x"), None)] * 20))
        await asyncio.sleep(0.05)
        replicas.living = []
        await asyncio.sleep(0.1)
        replicas.living = ["r0"]
        await pending
        await asyncio.sleep(0.1)
        assert [(state.rows, state.warm_calls) for state in router.fleet.states()] == [(0, 0)]
        await router.close()

    run(scenario())


def test_a_short_reply_leaves_nobody_waiting() -> None:
    async def scenario() -> None:
        async def send(replica: str, *_: object) -> ShardReply:
            return ShardReply(replica, [], ResidencyChange(0))

        router = dispatcher(Sending(send, "r0"))
        (outcome,) = await router.submit([(Row("x"), None)])
        assert isinstance(outcome, InternalError)
        await router.close()

    run(scenario())


def test_calls_for_cold_adapters_are_bounded() -> None:
    async def scenario() -> None:
        replicas = Replicas("r0", load_seconds=0.3)
        router = dispatcher(replicas)
        rows_of_all = [(Row(str(i), f"a{i}"), version(f"a{i}")) for i in range(200)]
        pending = [asyncio.create_task(router.submit([row])) for row in rows_of_all]
        await until(lambda: replicas.running["r0"] > 0)
        assert replicas.running["r0"] == 64
        assert [labels(await task) for task in pending] == [[str(i)] for i in range(200)]
        await router.close()

    run(scenario())


def test_more_rows_than_the_queue_ever_takes_are_the_callers_mistake() -> None:
    async def scenario() -> None:
        router = dispatcher(Replicas("r0"), max_queued_rows=10)
        outcomes = await router.submit(rows(11, 1))
        assert {type(outcome) for outcome in outcomes} == {InvalidRequest}
        await router.close()

    run(scenario())


def test_a_fault_while_rows_are_sent_again_leaves_nobody_waiting() -> None:
    async def scenario() -> None:
        async def send(replica: str, *_: object) -> ShardReply:
            router.fleet.least_loaded = broken  # type: ignore[method-assign]
            raise ReplicaLost(f"{replica} is gone")

        def broken(_: int) -> list[ReplicaState]:
            raise RuntimeError("a fault of ours")

        router = dispatcher(Sending(send, "r0", "r1"))
        (outcome,) = await router.submit([(Row("x"), None)])
        assert isinstance(outcome, ReplicaLost)
        await router.close()

    run(scenario())
