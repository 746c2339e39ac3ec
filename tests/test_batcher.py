"""When a batch leaves, and what it holds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_router.config import RoutingConfig
from adapter_router.routing.batcher import Batcher
from adapter_router.routing.fair_queue import FairQueue
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row

LOOP = asyncio.new_event_loop()
VERSION = AdapterVersion("a", "sha256:a", None, "text-classification", ("x",), "softmax")


@pytest.fixture(autouse=True, scope="module")
def loop() -> Iterator[None]:
    yield
    LOOP.close()


def waiting(tokens: int = 1, arrived: float = 0.0, tenant: str = "t", adapter: str | None = None) -> Waiting:
    version = replace(VERSION, adapter=adapter, digest=f"sha256:{adapter}") if adapter else None
    return Waiting(Row("", adapter, tenant=tenant), version, arrived, LOOP.create_future(), tokens)


def filled(*entries: Waiting) -> FairQueue:
    queue = FairQueue(max_wait_s=60)
    for entry in entries:
        queue.put(entry)
    return queue


def batcher(rows: int = 32, tokens: int = 16_384, padding: float = 0.25, wait_s: float = 0.002) -> Batcher:
    return Batcher(
        RoutingConfig(max_batch_rows=rows, max_batch_tokens=tokens, max_padding=padding, batch_wait_s=wait_s)
    )


def padded(batch: list[Waiting]) -> int:
    return len(batch) * max(entry.tokens for entry in batch)


def test_a_batch_closes_when_full_or_when_its_oldest_row_has_waited() -> None:
    some = batcher(rows=3, tokens=100, wait_s=0.5)
    queue = filled()
    assert some.closes_in(queue, now=0.0) is None
    queue.put(waiting(arrived=1.0))
    assert some.closes_in(queue, now=1.2) == pytest.approx(0.3)
    queue.put(waiting(arrived=1.3))
    assert some.closes_in(queue, now=1.5) == 0.0, "the oldest row counts, not the newest"
    queue.put(waiting(arrived=1.31))
    assert some.closes_in(queue, now=1.31) == 0.0, "full of rows"
    assert some.closes_in(filled(waiting(60), waiting(40)), now=0.1) == 0.0, "full of tokens"


def test_rows_leave_in_order_a_batch_at_a_time_and_are_charged() -> None:
    entries = [waiting(10, arrived=number) for number in range(5)]
    queue = filled(*entries)
    some = batcher(rows=2)
    assert some.take(queue, 9.0) == entries[:2]
    queue.put(waiting(10, arrived=9.0, tenant="new"))
    assert [entry.tenant for entry in some.take(queue, 9.0)] == ["t", "new"], "20 tokens were done before it came"
    queue.put(waiting(10, arrived=9.0, tenant="newer"))
    assert some.take(queue, 9.0)[-1].tenant == "newer"
    assert len(some.take(queue, 9.0)) == 1 and some.take(queue, 9.0) == []


def test_rows_whose_caller_has_gone_are_dropped() -> None:
    entries = [waiting() for _ in range(4)]
    queue = filled(*entries)
    entries[0].answer.cancel()
    entries[2].answer.cancel()
    assert batcher(rows=2).take(queue, 0.0) == [entries[1], entries[3]]
    assert len(queue) == 0


def test_tokens_fill_a_batch_padding_included() -> None:
    queue = filled(*(waiting(tokens) for tokens in [100, 90, 140, 100, 100]))
    batch = batcher(tokens=400).take(queue, 0.0)
    assert [entry.tokens for entry in batch] == [100, 90, 100, 100], "three with the one of 140 would be 420"


def test_a_row_larger_than_a_batch_goes_alone() -> None:
    queue = filled(waiting(5000), waiting(5))
    assert [entry.tokens for entry in batcher(tokens=4000).take(queue, 0.0)] == [5000]
    assert [entry.tokens for entry in batcher(tokens=4000).take(queue, 0.0)] == [5]


def test_rows_of_like_length_go_together() -> None:
    queue = filled(*(waiting(tokens) for _ in range(40) for tokens in (10, 500)))
    batches = [batcher(rows=16, tokens=16_384).take(queue, 0.0) for _ in range(5)]
    assert [{entry.tokens for entry in batch} for batch in batches] == [{10}, {500}, {10}, {500}, {10}]
    assert all(len(batch) == 16 for batch in batches[:4])


def test_padding_that_costs_less_than_a_forward_is_allowed() -> None:
    assert len(batcher(tokens=16_384).take(filled(waiting(10), waiting(266)), 0.0)) == 2
    assert len(batcher(tokens=16_384).take(filled(waiting(10), waiting(267)), 0.0)) == 1


def test_what_was_too_much_padding_for_a_few_rows_joins_many() -> None:
    queue = filled(waiting(400), waiting(20), *(waiting(400) for _ in range(10)))
    assert sorted(entry.tokens for entry in batcher().take(queue, 0.0))[0] == 20
    assert len(queue) == 0


def test_a_row_that_does_not_fit_keeps_its_place_and_what_it_is_owed() -> None:
    large = waiting(4000, tenant="large")
    queue = filled(waiting(10, tenant="small"), large, *(waiting(10, tenant="small") for _ in range(100)))
    assert large not in batcher().take(queue, 0.0)
    newcomer = waiting(4000, tenant="newcomer")
    queue.put(newcomer)
    assert batcher().take(queue, 0.0)[0] is large


def test_large_rows_are_not_overtaken_for_ever() -> None:
    """Small rows keep coming, enough for every batch: by length alone, or smallest first, the large one never goes."""
    queue = filled(waiting(10), waiting(4000), *(waiting(10) for _ in range(100)))
    some = batcher()
    for second in range(10):
        batch = some.take(queue, float(second))
        if any(entry.tokens == 4000 for entry in batch):
            break
        for _ in batch:
            queue.put(waiting(10, arrived=float(second)))
    assert second == 1


def test_a_tenant_whose_turn_never_begins_a_batch_gets_its_large_row_through() -> None:
    """Its small rows fill up the other's batches, so that its counter is never the lowest when one begins."""
    some = batcher(rows=2)
    large = waiting(4000, tenant="a")
    queue = filled(*(waiting(10, tenant="b") for _ in range(5)), large, *(waiting(10, tenant="a") for _ in range(5)))
    for number in range(200):
        batch = some.take(queue, float(number))
        if large in batch:
            break
        for entry in batch:
            queue.put(waiting(entry.tokens, number, entry.tenant))
    assert 2 < number < 40


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6000), st.sampled_from("tuv"), st.sampled_from(["x", "y", None])), max_size=120),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_every_row_leaves_once_and_every_batch_keeps_the_limits(
    rows: list[tuple[int, str, str | None]], most_rows: int, seed: int
) -> None:
    entries = [waiting(tokens, number, tenant, adapter) for number, (tokens, tenant, adapter) in enumerate(rows)]
    gone = {entry for entry in entries if random.Random(seed).random() < 0.1}
    for entry in gone:
        entry.answer.cancel()
    queue = filled(*entries)
    some = batcher(rows=most_rows, tokens=4096)
    left: list[Waiting] = []
    while batch := some.take(queue, 0.0):
        left += batch
        padding = padded(batch) - sum(entry.tokens for entry in batch)
        assert len(batch) <= most_rows
        assert len(batch) == 1 or padded(batch) <= 4096
        assert padding <= max(0.25 * padded(batch), 64), "64: what is always allowed"
    assert len(left) == len(set(left)) and set(left) == set(entries) - gone
    assert len(queue) == queue.tokens == 0 and not queue._tenants


@pytest.mark.parametrize(("tenants", "rows"), [(1, 20_000), (3, 1000), (5000, 2)])
def test_a_batch_looks_at_a_bounded_number_of_rows(tenants: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short row begins it, and none of the others fits."""
    queue = filled(waiting(1), *(waiting(4000, tenant=f"t{number % tenants}") for number in range(tenants * rows)))
    asked = []
    pops = FairQueue.pops

    def counted(queue: FairQueue, now: float, fits: Callable[[Waiting], bool], most: int) -> Iterator[Waiting]:
        return pops(queue, now, lambda entry: bool(asked.append(entry)) or fits(entry), most)  # type: ignore[func-returns-value]

    monkeypatch.setattr(FairQueue, "pops", counted)
    assert len(batcher().take(queue, 0.0)) == 1 and len(asked) <= 2 * 32 + 2


def test_rows_of_many_lengths_fill_their_batches() -> None:
    """First come, first served with the same limits makes batches of 16."""
    draws = random.Random(1)
    queue = filled(*(waiting(draws.randint(5, 60), tenant=f"t{number % 50}") for number in range(5000)))
    some = batcher()
    batches = [some.take(queue, 0.0) for _ in range(130)]
    assert sum(map(len, batches)) > 28 * len(batches)
    assert all(padded(batch) - sum(entry.tokens for entry in batch) <= 0.25 * padded(batch) for batch in batches[:100])
