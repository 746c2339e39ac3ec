"""What a replica says of itself: rows it has, how hard it works to have the right adapters, and who it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import serve

from adapter_router.config import CatalogConfig, EngineConfig
from adapter_router.engine import Engine
from adapter_router.engine.activity import Activity
from adapter_router.errors import DeadlineExceeded
from adapter_router.types import AdapterVersion, Row, RowResult
from deployments.replica import Replica
from tests.recorder import sample
from tests.tiny import TinyBase, random_features

FEATURES = random_features(np.random.default_rng(5))


# -- rates -------------------------------------------------------------------------------------------------------------


def test_evictions_come_and_go_as_a_rate() -> None:
    now = [50.0]
    activity = Activity(lambda: now[0], memory_s=10)
    assert activity.evictions_s == 0
    for _ in range(1000):
        now[0] += 0.25
        activity.evicted()
    assert activity.evictions_s == pytest.approx(4, rel=0.02)
    now[0] += 10
    assert activity.evictions_s == pytest.approx(4 / np.e, rel=0.02)
    now[0] += 1e6
    assert activity.evictions_s == pytest.approx(0)


def test_the_time_of_loads_that_overlap_counts_once() -> None:
    now = [0.0]
    activity = Activity(lambda: now[0], memory_s=10)
    for _ in range(200):  # of every second 0.5 with one load or two, 0.5 without
        with activity.loading():
            now[0] += 0.125
            with activity.loading():
                now[0] += 0.25
            now[0] += 0.125
        now[0] += 0.5
    assert activity.loading_fraction == pytest.approx(0.5, abs=0.02)
    with activity.loading():
        now[0] += 1e6
        assert activity.loading_fraction == pytest.approx(1)
    now[0] += 10
    assert activity.loading_fraction == pytest.approx(1 / np.e)


def test_a_load_that_fails_has_ended() -> None:
    now = [0.0]
    activity = Activity(lambda: now[0])
    with pytest.raises(ValueError, match="no"), activity.loading():
        raise ValueError("no")
    now[0] += 100
    assert activity.loading_fraction == 0


def test_an_engine_tells_what_its_device_is_busy_with(tiny_bert: TinyBase, tmp_path: Path) -> None:
    config = EngineConfig(
        base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=5_000, host_memory_bytes=0, store_dir=tmp_path
    )
    with Engine(config) as engine:
        idle = engine.load()
        assert (idle.used_bytes, idle.evictions_s, idle.loading_fraction) == (0, 0, 0)
        for seed in range(3):  # room for one
            engine.load_adapter(f"a{seed}", tiny_bert.adapter(tmp_path / f"a{seed}", 2, seed, r=4))
        assert engine.load().loading_fraction == 0  # a registration is nothing that rows wait for
        assert all(isinstance(engine.infer([Row(FEATURES, f"a{seed}")])[0], RowResult) for seed in range(3))
        busy = engine.load()
        assert 0 < busy.loading_fraction < 1 and busy.load_s == engine.load_s
        assert sample(engine, "adapter_evictions_total") == 5 and 0 < busy.evictions_s <= 0.5
        assert (busy.used_bytes, busy.capacity_bytes) == (engine.capacity().device_used, 5_000) and busy.used_bytes > 0


# -- a replica ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a deployment asks Serve about itself."""
    context = SimpleNamespace(app_name="load", replica_id=SimpleNamespace(unique_id="r0"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    return context


@pytest.fixture
def replica(tiny_bert: TinyBase, tmp_path: Path, place: SimpleNamespace) -> Iterator[Replica]:  # noqa: ARG001
    store = tmp_path / "store"
    replica = Replica(
        EngineConfig(base=str(tiny_bert.directory), device="cpu", store_dir=store), CatalogConfig(store_dir=store)
    )
    yield replica
    replica._engine.close()


@pytest.fixture
def version(replica: Replica, tiny_bert: TinyBase, tmp_path: Path) -> AdapterVersion:
    return replica._engine.load_adapter("a", tiny_bert.adapter(tmp_path / "a", 2, 1)).version


def rows(count: int, timeout_s: float | None = None) -> list[Row]:
    return [Row(FEATURES, "a", timeout_s=timeout_s)] * count


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - threads tell no loop
            await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_rows_of_all_callers_count_until_they_are_answered(replica: Replica, version: AdapterVersion) -> None:
    async def scenario() -> None:
        with replica._engine.base.lock:  # a forward is running
            calls = [asyncio.create_task(replica.infer(rows(count), [version] * count, 0)) for count in (2, 3)]
            await until(lambda: replica.load().rows == 5)
        replies = await asyncio.gather(*calls)
        assert sorted(reply.load.rows for reply in replies) in ([0, 2], [0, 3])
        assert replica.load().rows == 0
        assert all(isinstance(outcome, RowResult) for reply in replies for outcome in reply.outcomes)
        load = replies[0].load
        assert load.used_bytes > 0 and load.capacity_bytes == replica._engine.config.adapter_memory_bytes

    run(scenario())


def test_a_call_that_is_cancelled_costs_no_forward(replica: Replica, version: AdapterVersion) -> None:
    engine = replica._engine

    async def scenario() -> None:
        with engine.base.lock:
            call = asyncio.create_task(replica.infer(rows(4), [version] * 4, 0))
            await until(lambda: sample(engine, "engine_calls_total") == 1)  # a thread is at it
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert replica.load().rows == 0
        await asyncio.to_thread(replica._threads.shutdown)

    run(scenario())
    assert sample(engine, "forwards_total") == 0 and sample(engine, "rows_skipped_total", code="cancelled") == 4


def test_a_late_row_is_answered_beside_the_others(replica: Replica, version: AdapterVersion) -> None:
    async def scenario() -> None:
        reply = await replica.infer([*rows(1, -0.5), *rows(1, 3600)], [version] * 2, 0)
        late, answered = reply.outcomes
        assert isinstance(late, DeadlineExceeded) and isinstance(answered, RowResult)

    run(scenario())


def test_a_replica_is_known_by_its_rank(replica: Replica, place: SimpleNamespace) -> None:
    weight = replica._engine.config.adapter_memory_bytes
    assert replica.record_replica_metadata() == {"home": "r0", "weight": weight}
    place.rank = SimpleNamespace(rank=3, node_rank=1, local_rank=0)
    assert replica.record_replica_metadata() == {"home": "rank-3", "weight": weight}
