"""The order in which rows leave: fair to tenants and adapters, urgent ones first, nobody for ever last."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from adapter_router.routing.fair_queue import FairQueue
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row

LOOP = asyncio.new_event_loop()
VERSION = AdapterVersion("a", "sha256:a", None, "text-classification", ("x",), "softmax")


@pytest.fixture(autouse=True, scope="module")
def loop() -> Iterator[None]:
    yield
    LOOP.close()


def waiting(tenant: str = "t", adapter: str = "a", arrived: float = 0.0, tokens: int = 1, priority: int = 0) -> Waiting:
    version = replace(VERSION, adapter=adapter, digest=f"sha256:{adapter}")
    row = Row("", adapter, tenant=tenant, priority=priority)
    return Waiting(row, version, arrived, LOOP.create_future(), tokens)


def drained(queue: FairQueue, count: int, now: float = 0.0) -> list[Waiting]:
    taken = []
    for _ in range(count):
        entry = queue.pop(now)
        assert entry is not None
        queue.charge(entry)
        taken.append(entry)
    return taken


def test_a_tenant_that_sends_ten_times_as_much_gets_half() -> None:
    queue = FairQueue(max_wait_s=60)
    for _ in range(100):
        queue.put(waiting("greedy"))
    for _ in range(10):
        queue.put(waiting("modest"))
    assert Counter(entry.tenant for entry in drained(queue, 20)) == {"greedy": 10, "modest": 10}
    assert len(queue) == 90 and queue.tokens == 90


def test_tokens_count_not_rows() -> None:
    queue = FairQueue(max_wait_s=60)
    for _ in range(100):
        queue.put(waiting("long", tokens=100))
        queue.put(waiting("short", tokens=10))
    taken = Counter(entry.tenant for entry in drained(queue, 55))
    assert taken["short"] == pytest.approx(50, abs=1)


def test_weights_are_shares() -> None:
    queue = FairQueue(max_wait_s=60, weight=lambda tenant: 3.0 if tenant == "large" else 1.0)
    for _ in range(100):
        queue.put(waiting("large"))
        queue.put(waiting("small"))
    assert Counter(entry.tenant for entry in drained(queue, 40)) == {"large": 30, "small": 10}


def test_adapters_of_one_tenant_share_its_turns() -> None:
    queue = FairQueue(max_wait_s=60)
    for _ in range(50):
        queue.put(waiting(adapter="hot"))
    for _ in range(5):
        queue.put(waiting(adapter="rare"))
    queue.put(waiting("other"))
    taken = drained(queue, 11)
    assert Counter(entry.version.adapter for entry in taken if entry.version) == {"hot": 5, "rare": 5, "a": 1}


def test_the_urgent_go_first_and_the_late_before_them() -> None:
    queue = FairQueue(max_wait_s=10)
    patient = waiting(arrived=0)
    queue.put(patient)
    for second in range(1, 30):
        queue.put(waiting(arrived=second, priority=-1))
    assert patient not in drained(queue, 5, now=9.9)
    assert drained(queue, 1, now=10.0) == [patient]


def test_what_comes_back_keeps_its_place() -> None:
    queue = FairQueue(max_wait_s=60)
    entries = [waiting(arrived=second) for second in range(5)]
    for entry in entries:
        queue.put(entry)
    first, second = queue.pop(5.0), queue.pop(5.0)
    assert first is not None and second is not None
    queue.put(second)
    queue.put(first)
    assert queue.oldest is first
    assert drained(queue, 5, now=5.0) == entries


def test_a_row_whose_caller_has_gone_leaves_no_trace() -> None:
    queue = FairQueue(max_wait_s=60)
    for number in range(5000):
        entry = waiting(f"tenant-{number}", f"adapter-{number}", arrived=number)
        queue.put(entry)
        if number:
            queue.remove(entry)
            queue.remove(entry)
    assert len(queue) == 1 and queue.tokens == 1 and len(queue._arrivals) < 2000 and len(queue._tenants) == 1
    assert [entry.tenant for entry in drained(queue, 1)] == ["tenant-0"]
    assert queue.pop(0.0) is None and queue.oldest is None
