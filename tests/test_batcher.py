"""When a batch leaves, and what it holds."""

from __future__ import annotations

import asyncio

import pytest

from adapter_router.routing.batcher import Batcher, Waiting
from adapter_router.types import Row


def waiting(loop: asyncio.AbstractEventLoop, arrived: float, text: str = "x") -> Waiting:
    return Waiting(Row(text), None, arrived, loop.create_future())


def test_a_batch_closes_when_full_or_when_its_oldest_row_has_waited() -> None:
    loop = asyncio.new_event_loop()
    batcher = Batcher(max_batch_rows=3, batch_wait_s=0.5)
    assert batcher.closes_in(now=0.0) is None
    batcher.put(waiting(loop, arrived=1.0))
    assert batcher.closes_in(now=1.2) == pytest.approx(0.3)
    batcher.put(waiting(loop, arrived=1.3))
    assert batcher.closes_in(now=1.5) == 0.0, "the oldest row counts, not the newest"
    batcher.put(waiting(loop, arrived=1.31))
    assert batcher.closes_in(now=1.31) == 0.0, "full"
    loop.close()


def test_rows_leave_in_order_a_full_batch_for_each_free_replica() -> None:
    loop = asyncio.new_event_loop()
    batcher = Batcher(max_batch_rows=2, batch_wait_s=0.0)
    for index in range(5):
        batcher.put(waiting(loop, 0.0, str(index)))
    assert [entry.row.inputs for entry in batcher.take(2)] == ["0", "1", "2", "3"]
    assert [entry.row.inputs for entry in batcher.take(2)] == ["4"] and len(batcher) == 0
    loop.close()


def test_rows_whose_caller_has_gone_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    batcher = Batcher(max_batch_rows=2, batch_wait_s=0.0)
    entries = [waiting(loop, 0.0, str(index)) for index in range(4)]
    for entry in entries:
        batcher.put(entry)
    entries[0].answer.cancel()
    entries[2].answer.cancel()
    assert [entry.row.inputs for entry in batcher.take(1)] == ["1", "3"]
    loop.close()
