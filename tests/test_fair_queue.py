"""The order in which rows leave: fair to tenants and adapters, urgent ones first, nobody for ever last."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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


def test_where_much_is_late_the_urgent_have_every_second_turn() -> None:
    """An overload makes everything late: the oldest first would be first come, first served, whatever the priority."""
    queue = FairQueue(max_wait_s=10)
    for second in range(100):
        queue.put(waiting(arrived=second))
    for second in range(100, 110):
        queue.put(waiting(arrived=second, priority=-1))
    taken = drained(queue, 20, now=200.0)
    assert [entry.row.priority for entry in taken] == [0, -1] * 10


def test_where_much_is_late_tenants_and_adapters_still_have_their_shares() -> None:
    queue = FairQueue(max_wait_s=10)
    for _ in range(100):
        queue.put(waiting("greedy", "hot", arrived=0))
    for _ in range(10):
        queue.put(waiting("greedy", "rare", arrived=30))
        queue.put(waiting("modest", arrived=30))
    taken = drained(queue, 20, now=30.0)
    assert Counter(entry.tenant for entry in taken) == {"greedy": 10, "modest": 10}
    assert sum(entry.digest == "sha256:rare" for entry in taken) == 5


def test_the_bare_base_is_one_of_a_tenants_adapters() -> None:
    queue = FairQueue(max_wait_s=60)
    base = Waiting(Row(""), None, 0.0, LOOP.create_future())
    base.row = replace(base.row, tenant="t")
    for _ in range(3):
        queue.put(waiting(adapter="x"))
    queue.put(base)
    assert base in drained(queue, 2) and len(drained(queue, 2)) == 2


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


def test_a_row_is_in_it_once() -> None:
    queue = FairQueue(max_wait_s=60)
    entry = waiting(tokens=3)
    queue.put(entry)
    queue.put(entry)
    assert len(queue) == 1 and queue.tokens == 3
    assert queue.pop(0.0) is entry and queue.pop(0.0) is None


def test_who_is_passed_over_is_not_charged_and_keeps_its_place() -> None:
    """Rows of one call arrive at the same moment; nothing but their places tells them apart."""
    queue = FairQueue(max_wait_s=60)
    large = [waiting("a", tokens=100) for _ in range(3)]
    for entry in [*large, *(waiting("b", tokens=10) for _ in range(3))]:
        queue.put(entry)
    assert [entry.tenant for entry in fitting(queue, 10)] == ["b", "b", "b"]
    queue.put(waiting("new"))
    assert [entry.tenant for entry in drained(queue, 2)] == ["a", "new"], "the lowest is still 0"
    assert drained(queue, 2) == large[1:]


def test_rows_that_do_not_fit_let_their_tenants_others_and_other_tenants_go() -> None:
    queue = FairQueue(max_wait_s=60)
    for tenant in "ab":
        for tokens in (100, 10, 100, 10):
            queue.put(waiting(tenant, tokens=tokens))
    assert [entry.tenant for entry in fitting(queue, 10)] == ["a", "b", "a", "b"]
    assert [entry.tokens for entry in drained(queue, 4)] == [100] * 4


def test_nobody_of_its_tenant_overtakes_a_row_for_ever() -> None:
    """Neither of its adapter nor of another."""
    for adapter in "ab":
        queue = FairQueue(max_wait_s=60)
        queue.put(waiting(tokens=100))
        overtaken = -1
        taken = [queue.oldest]
        while taken and overtaken < 50:
            overtaken += 1
            queue.put(waiting(tokens=10, adapter=adapter))
            queue.put(waiting("other", tokens=10))
            taken = [entry for entry in fitting(queue, 10) if entry.tenant == "t"]
        assert overtaken == 32 and queue.oldest in fitting(queue, 100)


def fitting(queue: FairQueue, longest: int) -> list[Waiting]:
    taken = []
    with closing(queue.pops(0.0, lambda entry: entry.tokens <= longest, 100)) as turns:
        for entry in turns:
            queue.charge(entry)
            taken.append(entry)
    return taken


def test_a_row_whose_caller_has_gone_leaves_no_trace() -> None:
    queue = FairQueue(max_wait_s=60)
    for number in range(5000):
        entry = waiting(f"tenant-{number}", f"adapter-{number}", arrived=number)
        queue.put(entry)
        if number:
            queue.remove(entry)
            queue.remove(entry)
    assert len(queue) == 1 and queue.tokens == 1 and len(queue._arrivals) < 200 and len(queue._tenants) == 1
    assert [entry.tenant for entry in drained(queue, 1)] == ["tenant-0"]
    assert queue.pop(0.0) is None and queue.oldest is None


def test_memory_stays_while_a_hundred_thousand_rows_come_and_go() -> None:
    """Behind one that stays, of its own tenant and adapter: what has gone is in the middle of every heap."""
    queue = FairQueue(max_wait_s=60)
    queue.put(waiting())
    for number in range(100_000):
        entry = waiting(arrived=number, adapter="a" if number % 2 else f"b-{number}")
        queue.put(entry)
        queue.remove(entry)
    tenant = queue._tenants["t"]
    (flow,) = tenant.flows.values()
    (line,) = flow._lines.values()
    assert max(len(queue._arrivals), len(flow._arrivals), len(line)) < 200
    assert len(tenant.adapters._order) < 200 and len(tenant.adapters._done) < 200 and len(queue._places) == 1


def test_a_turn_costs_a_few_steps_of_a_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of O(log n), whoever waits: 100 times as many tenants and rows need no more of them."""
    costs = []
    for tenants in (10, 1000):
        queue = FairQueue(max_wait_s=60)
        for number in range(tenants * 5):
            queue.put(
                waiting(f"tenant-{number % tenants}", f"adapter-{number % 3}", arrived=number, tokens=number % 7 + 1)
            )
        steps = Counter[str]()
        for name in ("heappush", "heappop", "heapify"):
            monkeypatch.setattr(heapq, name, partial(_counted, steps, name, getattr(heapq, name)))
        drained(queue, tenants * 5)
        monkeypatch.undo()
        costs.append(steps.total() / (tenants * 5))
    assert max(costs) < 10 and costs[1] < 1.5 * costs[0]


def _counted(steps: Counter[str], name: str, function: Callable[..., Any], *args: Any) -> Any:
    steps[name] += 1
    return function(*args)


class Machine(RuleBasedStateMachine):
    """Against a plain list of rows: none lost, none twice, in order, and tenants no more than U apart."""

    @initialize(weight=st.sampled_from([0.5, 1.0, 3.0]))
    def begin(self, weight: float) -> None:
        self.queue = FairQueue(max_wait_s=50, weight=lambda tenant: weight if tenant == "a" else 1.0)
        self.rows: list[Waiting] = []
        self.left: set[Waiting] = set()
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        adapter=st.sampled_from("xyz"),
        tokens=st.integers(1, 40),
        priority=st.integers(-1, 1),
    )
    def put(self, tenant: str, adapter: str, tokens: int, priority: int) -> None:
        entry = waiting(tenant, adapter, self.now, tokens, priority)
        self.rows.append(entry)
        self.queue.put(entry)

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(draws=st.randoms(use_true_random=False))
    def cancel(self, draws: Random) -> None:
        if self.rows:
            self.gone(draws.choice(self.rows), removed=False)

    @rule()
    def pop(self) -> None:
        entry = self.queue.pop(self.now)
        assert (entry is None) == (not self.rows)
        if entry is not None:
            assert entry in self.heads(entry)
            self.gone(entry, removed=True)
            self.queue.charge(entry)

    @rule()
    def pop_and_put_back(self) -> None:
        entry = self.queue.pop(self.now)
        if entry is not None:
            self.queue.put(entry)
            self.rows.remove(entry)
            self.rows.append(entry)

    @rule(longest=st.integers(1, 40), most=st.integers(1, 10), stop=st.integers(1, 20))
    def take(self, longest: int, most: int, stop: int) -> None:
        taken = []
        with closing(self.queue.pops(self.now, lambda entry: entry.tokens <= longest, most)) as turns:
            for entry in islice(turns, stop):
                assert entry.tokens <= longest
                taken.append(entry)
                self.gone(entry, removed=True)
                self.queue.charge(entry)
        heads = [entry for entry in self.rows if entry in self.heads(entry)]
        if len(taken) < stop and most >= 3:
            assert not any(entry.tokens <= longest for entry in heads), "who may go and fits is gone"

    def heads(self, entry: Waiting) -> list[Waiting]:
        """Who may go of its tenant and adapter: the most urgent, of those the first; or the oldest if it is late."""
        flow = [other for other in self.rows if (other.tenant, other.digest) == (entry.tenant, entry.digest)]
        oldest = min(flow, key=lambda other: other.arrived)
        urgent = min(flow, key=lambda other: (other.row.priority, other.arrived))
        return [urgent, oldest] if self.now - oldest.arrived >= 50 else [urgent]

    def gone(self, entry: Waiting, removed: bool) -> None:
        assert entry not in self.left
        self.left.add(entry)
        self.rows.remove(entry)
        if not removed:
            self.queue.remove(entry)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        assert len(queue) == len(self.rows) and queue.tokens == sum(entry.tokens for entry in self.rows)
        assert set(queue._tenants) == {entry.tenant for entry in self.rows}
        oldest = queue.oldest
        assert (oldest is None) == (not self.rows)
        assert oldest is None or oldest.arrived == min(entry.arrived for entry in self.rows)
        for name, tenant in queue._tenants.items():
            assert set(tenant.flows) == {entry.digest for entry in self.rows if entry.tenant == name}
            assert not tenant.adapters._passed
        assert not queue._shares._passed

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            assert set(drained(self.queue, len(self.rows), self.now)) == set(self.rows)
            assert not queue_holds(self.queue)


def queue_holds(queue: FairQueue) -> int:
    return len(queue) + queue.tokens + len(queue._tenants) + len(queue._places)


TestAgainstAPlainList = Machine.TestCase
TestAgainstAPlainList.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=20, max_size=100),
    st.sampled_from([1.0, 2.0, 5.0]),
    st.lists(st.integers(1, 50), max_size=60),
)
def test_between_two_tenants_that_wait_all_the_time_the_difference_is_bounded(
    rows: list[tuple[int, int]], weight: float, passing: list[int]
) -> None:
    """|W_f / w_f - W_g / w_g| <= 2 U (Sheng et al., theorem 4.4), whoever else comes and goes."""
    queue = FairQueue(max_wait_s=0.0, weight=lambda tenant: weight if tenant == "heavy" else 1.0)
    for heavy, light in rows * 4:
        queue.put(waiting("heavy", tokens=heavy))
        queue.put(waiting("light", tokens=light))
    done = {"heavy": 0.0, "light": 0.0}
    others = iter(passing)
    for _ in range(len(rows)):
        if (tokens := next(others, None)) is not None:
            queue.put(waiting(f"other-{tokens}", tokens=tokens))
        (entry,) = drained(queue, 1, now=100.0)
        if entry.tenant in done:
            done[entry.tenant] += entry.tokens / (weight if entry.tenant == "heavy" else 1.0)
        assert abs(done["heavy"] - done["light"]) <= 2 * 50
