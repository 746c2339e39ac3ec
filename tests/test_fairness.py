"""Queue, batcher and admission together, under a virtual clock: who is served when others ask for too much.

Most promises are kept by our rules and broken by simple ones on the same arrivals: what both keep tells nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
import pytest

from adapter_router.config import RoutingConfig
from adapter_router.errors import Overloaded
from adapter_router.routing.admission import Admission, Backlog
from adapter_router.routing.batcher import Batcher
from adapter_router.routing.fair_queue import FairQueue
from adapter_router.routing.pace import Pace
from adapter_router.routing.waiting import Waiting
from adapter_router.types import Row

LOOP = asyncio.new_event_loop()


@pytest.fixture(autouse=True, scope="module")
def loop() -> Iterator[None]:
    yield
    LOOP.close()


def waiting(arrived: float, tenant: str = "", tokens: int = 20, priority: int = 0) -> Waiting:
    return Waiting(Row("", tenant=tenant, priority=priority), None, arrived, LOOP.create_future(), tokens)


class Rule(Protocol):
    """What a simulated router does with rows; ``free``: whether a replica has nothing to do."""

    def put(self, entry: Waiting) -> None: ...

    def closes_in(self, now: float, free: bool, /) -> float | None: ...

    def take(self, now: float, /) -> list[Waiting]: ...


class Ours:
    def __init__(self, config: RoutingConfig) -> None:
        self.queue = FairQueue(config.max_wait_s, lambda tenant: config.tenant_weights.get(tenant, 1.0))
        self._batcher = Batcher(config)

    def put(self, entry: Waiting) -> None:
        self.queue.put(entry)

    def closes_in(self, now: float, free: bool) -> float | None:
        return self._batcher.closes_in(self.queue, now) if free else None

    def take(self, now: float) -> list[Waiting]:
        return self._batcher.take(self.queue, now)


class FirstComeFirstServed(Ours):
    """Everybody is one tenant."""

    def put(self, entry: Waiting) -> None:
        anyone = Row("", tenant="anyone")
        entry.sent_to, entry.row = entry.row.tenant, anyone
        super().put(entry)


class TimerOnly:
    """A batch leaves when its time is over or it is full, and waits at the replica if that is busy."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config
        self._rows: deque[Waiting] = deque()

    def put(self, entry: Waiting) -> None:
        self._rows.append(entry)

    def closes_in(self, now: float, _free: bool) -> float | None:
        if not self._rows:
            return None
        full = len(self._rows) >= self._config.max_batch_rows
        return 0.0 if full else max(0.0, self._rows[0].arrived + self._config.batch_wait_s - now)

    def take(self, _now: float) -> list[Waiting]:
        return [self._rows.popleft() for _ in range(min(len(self._rows), self._config.max_batch_rows))]


class SmallestFirst(TimerOnly):
    """The least padding, and nobody waits long who is short."""

    def closes_in(self, now: float, free: bool) -> float | None:
        return super().closes_in(now, free) if free else None

    def take(self, now: float) -> list[Waiting]:
        self._rows = deque(sorted(self._rows, key=lambda entry: entry.tokens))
        return super().take(now)


@dataclass
class Outcome:
    batches: list[list[Waiting]] = field(default_factory=list)
    seconds: dict[Waiting, float] = field(default_factory=dict)  # from arrival to answer
    refused: Counter[str] = field(default_factory=Counter)

    def p99(self, tenants: Iterable[str]) -> float:
        chosen = set(tenants)
        times = [seconds for entry, seconds in self.seconds.items() if (entry.sent_to or entry.tenant) in chosen]
        return float(np.percentile(times, 99))


@dataclass(frozen=True)
class Machine:
    """What a forward takes: ``fixed_s``, and ``token_s`` for each token, padding included."""

    fixed_s: float = 0.01
    token_s: float = 0.0001

    def seconds(self, num_rows: int, longest: int) -> float:
        return self.fixed_s + self.token_s * num_rows * longest

    def rate(self, num_rows: int = 32, tokens: int = 20) -> float:
        """Rows a second, in batches of so many."""
        return num_rows / self.seconds(num_rows, tokens)


CPU = Machine()  # 10 ms and 2 ms a row of 20 tokens
ACCELERATOR = Machine(0.006, 0.000002)  # a batch of 32 takes little more than one row


def simulated(
    rows: Iterable[Waiting],
    rule: Rule,
    config: RoutingConfig,
    machine: Machine = CPU,
    replicas: int = 1,
    until: float = float("inf"),
) -> Outcome:
    """Let ``rows`` come at their times, up to ``until``; a batch runs on the replica that is free first."""
    outcome, admission, pace = Outcome(), Admission(config), Pace()
    open_tokens = 0
    numbers = count()
    events: list[tuple[float, int, Waiting | list[Waiting] | None]] = [
        (row.arrived, next(numbers), row) for row in rows
    ]
    heapq.heapify(events)
    free_at = [0.0] * replicas
    while events and events[0][0] <= until:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Waiting):
            tenant = event.tenant
            tokens_s = replicas / pace.token_s if pace.token_s else None
            backlog = Backlog(open_tokens if min(free_at) > now else 0, tokens_s)
            if (error := admission.refusal(tenant, 1, event.tokens, config.timeout_s, backlog)) is not None:
                assert isinstance(error, Overloaded) and 1 <= error.retry_after_s <= 60
                outcome.refused[tenant] += 1
                continue
            admission.entered(tenant, 1, event.tokens)
            open_tokens += event.tokens
            rule.put(event)
        for entry in event if isinstance(event, list) else ():
            outcome.seconds[entry] = now - entry.arrived
            admission.left(entry.sent_to or entry.tenant, 1, entry.tokens)
            open_tokens -= entry.tokens
        while (closes_in := rule.closes_in(now, min(free_at) <= now)) == 0.0 and (batch := rule.take(now)):
            outcome.batches.append(batch)
            replica = free_at.index(min(free_at))
            seconds = machine.seconds(len(batch), max(entry.tokens for entry in batch))
            pace.add(sum(entry.tokens for entry in batch), seconds)
            free_at[replica] = max(now, free_at[replica]) + seconds
            heapq.heappush(events, (free_at[replica], next(numbers), batch))
        if closes_in:
            heapq.heappush(events, (now + closes_in, next(numbers), None))
    return outcome


def poisson(rate: float, seconds: float, seed: int, make: Callable[[float], Waiting]) -> list[Waiting]:
    draws = random.Random(seed)
    now, rows = 0.0, []
    while (now := now + draws.expovariate(rate)) < seconds:
        rows.append(make(now))
    return rows


LIGHT = [f"light-{number}" for number in range(9)]


def light_rows(rate: float, seconds: float) -> list[Waiting]:
    """Nine tenants that ask for ``rate`` rows a second together."""
    rows = []
    for number, tenant in enumerate(LIGHT):
        rows += poisson(rate / 9, seconds, number, lambda now, tenant=tenant: waiting(now, tenant))  # type: ignore[misc]
    return rows


def greedy_rows(rate: float, seconds: float) -> list[Waiting]:
    return poisson(rate, seconds, 99, lambda now: waiting(now, "greedy"))


# More waits than max_wait_s allows: a rule that lets whoever is late go first has become first come, first served.
CROWDED = RoutingConfig(max_queued_rows=2000, max_wait_s=0.1)


@pytest.mark.parametrize("times_capacity", [1.0, 2.5], ids=["ten times its share", "three times what can be done"])
def test_a_tenant_that_sends_too_much_leaves_the_others_p99_as_it_is(times_capacity: float) -> None:
    """Ten tenants, of which nine ask for half of what can be done: each for little more than half of its share."""
    machine, seconds = ACCELERATOR, 0.6
    rate = machine.rate()
    alone = simulated(light_rows(0.5 * rate, seconds), Ours(CROWDED), CROWDED, machine).p99(LIGHT)
    results = []
    for rule in (Ours, FirstComeFirstServed):
        rows = light_rows(0.5 * rate, seconds) + greedy_rows(times_capacity * rate, seconds)
        results.append(simulated(rows, rule(CROWDED), CROWDED, machine, until=seconds))
    ours, simple = results
    assert ours.p99(LIGHT) <= 1.3 * alone
    assert simple.p99(LIGHT) > 5 * alone
    assert not ours.refused.keys() & set(LIGHT), "the room is shared as well"
    done = sum(len(batch) for batch in ours.batches)
    assert done > 0.95 * rate * seconds, "nothing is held back for those who ask for little"


def test_where_rows_cost_what_they_are_the_others_wait_for_two_forwards_at_most() -> None:
    """Alone they had smaller forwards to wait for: no rule that keeps replicas busy can give them that."""
    seconds, full_s = 8.0, CPU.seconds(32, 20)
    results = []
    for rule in (Ours, FirstComeFirstServed):
        rows = light_rows(0.5 * CPU.rate(), seconds) + greedy_rows(2.5 * CPU.rate(), seconds)
        results.append(simulated(rows, rule(CROWDED), CROWDED, until=seconds))
    ours, simple = (result.p99(LIGHT) for result in results)
    assert ours <= 2 * full_s < 10 * full_s < simple


def test_rows_that_wait_while_replicas_are_busy_make_batches_four_times_as_large() -> None:
    """As a timer makes of the same arrivals, which a replica then runs one after the other."""
    config = RoutingConfig()
    rate, seconds = 0.85 * CPU.rate(), 5.0
    sizes = []
    for rule in (Ours, TimerOnly):
        rows = poisson(rate, seconds, 1, lambda now: waiting(now, "t"))
        outcome = simulated(rows, rule(config), config)
        assert len(outcome.seconds) == len(rows)
        sizes.append(len(rows) / len(outcome.batches))
    assert sizes[0] >= 4 * sizes[1]


def test_large_rows_are_not_overtaken_for_ever() -> None:
    """Short ones come as fast as they can be served, of the same tenant and of another."""
    config, seconds = RoutingConfig(max_queued_rows=2000), 4.0
    waits = []
    for rule in (Ours, SmallestFirst):
        large = [waiting(0.5, tenant, tokens=300) for tenant in ("a", "b")]
        short = [row for name in "ab" for row in poisson(0.6 * CPU.rate(), seconds, ord(name), short_of(name))]
        outcome = simulated([*large, *short], rule(config), config, until=seconds)
        waits.append([outcome.seconds.get(row, float("inf")) for row in large])
    assert max(waits[0]) < 0.5
    assert min(waits[1]) == float("inf")


def short_of(tenant: str) -> Callable[[float], Waiting]:
    return lambda now: waiting(now, tenant)


@pytest.mark.parametrize("lengths", [(20, 20), (20, 40), (60, 20)])
def test_twice_the_weight_is_twice_the_tokens(lengths: tuple[int, int]) -> None:
    seconds = 8.0
    config = RoutingConfig(max_queued_rows=400, tenant_weights={"gold": 2.0})
    rows = []
    for tenant, tokens in zip(("gold", "plain"), lengths, strict=True):
        rows += poisson(1200.0, seconds, tokens, lambda now, t=tenant, n=tokens: waiting(now, t, n))  # type: ignore[misc]
    outcome = simulated(rows, Ours(config), config, until=seconds)
    done = Counter[str]()
    for entry in outcome.seconds:
        done[entry.tenant] += entry.tokens
    assert done["gold"] / done["plain"] == pytest.approx(2.0, rel=0.05)


def test_urgent_rows_go_before_their_tenants_others_and_before_nobody_elses() -> None:
    """One tenant calls all its rows urgent, another some of them; both ask for more than their share."""
    seconds = 4.0
    config = RoutingConfig(max_queued_rows=600, max_wait_s=60)
    rows = poisson(800.0, seconds, 1, lambda now: waiting(now, "loud", priority=-5))
    rows += poisson(600.0, seconds, 2, lambda now: waiting(now, "calm"))
    rows += poisson(30.0, seconds, 3, lambda now: waiting(now, "calm", priority=-1))
    outcome = simulated(rows, Ours(config), config, until=seconds)
    done = Counter(entry.tenant for entry in outcome.seconds)
    assert done["loud"] == pytest.approx(done["calm"], rel=0.05)
    times: dict[int, list[float]] = {0: [], -1: []}
    for entry, took in outcome.seconds.items():
        if entry.tenant == "calm":
            times[entry.row.priority].append(took)
    assert max(times[-1]) < 3 * CPU.seconds(32, 20)
    assert np.median(times[0]) > 5 * np.median(times[-1])


def test_what_is_let_in_is_served_in_time_and_what_is_not_is_told_when_to_come() -> None:
    """Five times what can be done, for ten times the timeout."""
    config = RoutingConfig(timeout_s=1.0)
    rows = poisson(5 * CPU.rate(), 10.0, 1, lambda now: waiting(now, f"t{int(1000 * now) % 7}"))
    outcome = simulated(rows, Ours(config), config, until=10.0)
    settled = [took for entry, took in outcome.seconds.items() if entry.arrived > 2.0]
    assert np.percentile(settled, 99) <= config.timeout_s
    assert len(outcome.seconds) > 0.9 * CPU.rate() * 10.0
    assert outcome.refused.total() > 3 * CPU.rate() * 10.0
