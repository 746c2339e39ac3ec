"""Events in virtual time: rows come, batches end, loads end, replies arrive, replicas go and come."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from adapter_router.types import ReplicaLoad, ResidencyChange
from benchmarks.routing_simulation.replicas import Cache, Replica, Row, Truth
from benchmarks.routing_simulation.routers import PEERS, Ours, Router
from benchmarks.routing_simulation.setting import Setting
from benchmarks.routing_simulation.traces import Change, Trace

_ASKED_HOMES = 2000  # adapters whose homes are compared before and after a change


@dataclass(frozen=True)
class Figures:
    """Of the rows that came in the counted part of a trace.

    ``hit_rate``: rows that found their adapter there. ``loads_per_1000``: rows. ``balance``: rows of the busiest
    replica over the mean, for the time that each lived. ``p50_s``, ``p99_s``: from coming to answered. ``moved``: of
    the adapters' homes, in replicas' fair shares for each replica that went or came, None where there are no changes or
    no homes: 1.0 is the least possible. ``copies``: of a resident adapter, at the end.
    """

    hit_rate: float
    loads_per_1000: float
    balance: float
    p50_s: float
    p99_s: float
    moved: float | None
    copies: float
    rows: int


def simulate(policy: str, trace: Trace, setting: Setting, *, lru: bool) -> Figures:
    """``policy``: "ours" or a peer's; ``lru``: caches evict the least recently used, not what the engine does."""
    world = _World(policy, trace, setting, lru=lru)
    world.run()
    return world.figures()


class _World:
    def __init__(self, policy: str, trace: Trace, setting: Setting, *, lru: bool) -> None:
        self._trace = trace
        self._setting = setting
        self._lru = lru
        self._truth = Truth(setting.replicas)
        self._routers = _routers(policy, setting, self._truth)
        self._replicas: dict[int, Replica] = {}
        self._lives: Counter[int] = Counter()
        self._since: dict[int, float] = {}
        self._lived: defaultdict[int, float] = defaultdict(float)  # seconds of the counted part
        self._taken: Counter[int] = Counter()  # rows, of those
        self._rows: list[Row] = []
        self._waits: list[float] = []
        self._hits = 0
        self._loads = 0
        self._moves: list[float] = []
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbered = 0

    def run(self) -> None:
        """Until every row has its answer."""
        trace = self._trace
        self._change(Change(0.0, came=range(trace.living)))
        for change in trace.changes:
            self._at(change.time, partial(self._change, change))
        names = [f"adapter {number}" for number in range(self._setting.adapters)]
        routers = np.random.default_rng(0).integers(len(self._routers), size=len(trace.times))
        rows = zip(trace.times.tolist(), trace.adapters.tolist(), routers.tolist(), strict=True)
        for time, adapter, router in rows:
            self._until(time)
            self._now = time
            row = Row(names[adapter], router, time)
            self._rows.append(row)
            self._send(row)
        self._until(np.inf)

    def figures(self) -> Figures:
        """Sum up; every row must have been answered once."""
        assert all(row.answers == 1 for row in self._rows)
        end = float(self._trace.times[-1])
        for index in self._replicas:
            self._lived_until(index, end)
        counted = sum(row.arrived >= self._trace.counted_from for row in self._rows)
        speeds = [self._taken[index] / seconds for index, seconds in self._lived.items() if seconds > 0]
        weights = [seconds for seconds in self._lived.values() if seconds > 0]
        copies = [len(holders) for holders in self._truth.held.values() if holders]
        p50, p99 = np.percentile(self._waits, [50, 99])
        return Figures(
            hit_rate=self._hits / counted,
            loads_per_1000=1000 * self._loads / counted,
            balance=max(speeds) / float(np.average(speeds, weights=weights)),
            p50_s=float(p50),
            p99_s=float(p99),
            moved=float(np.mean(self._moves)) if self._moves else None,
            copies=float(np.mean(copies)),
            rows=counted,
        )

    def _at(self, time: float, do: Callable[[], None]) -> None:
        self._numbered += 1
        heapq.heappush(self._events, (time, self._numbered, do))

    def _until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            self._now, _, do = heapq.heappop(self._events)
            do()

    def _send(self, row: Row) -> None:
        index = self._routers[row.router % len(self._routers)].pick(row, self._now)
        replica = self._replicas[index]
        hit = replica.take(row)
        if row.arrived >= self._trace.counted_from:
            self._hits += hit
            self._taken[index] += 1
        self._serve(replica)

    def _serve(self, replica: Replica) -> None:
        """Have it do what it can."""
        setting = self._setting
        if replica.install() or replica.loading is None:
            self._load_next(replica)
        if not replica.running and replica.ready:
            count = min(len(replica.ready), setting.batch_rows)
            replica.running = [replica.ready.popleft() for _ in range(count)]
            seconds = setting.batch_s + count * setting.row_s
            self._at(self._now + seconds, lambda: self._answer(replica, seconds))

    def _load_next(self, replica: Replica) -> None:
        if replica.loading is None and replica.loaded is None and replica.to_load:
            replica.loading = replica.to_load.popleft()
            self._loads += self._now >= self._trace.counted_from
            self._at(self._now + self._setting.load_s, lambda: self._loaded(replica))

    def _loaded(self, replica: Replica) -> None:
        if replica.alive:
            replica.loaded, replica.loading = replica.loading, None
            self._serve(replica)

    def _answer(self, replica: Replica, seconds: float) -> None:
        if not replica.alive:
            return
        rows = replica.finish()
        by_router: defaultdict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_router[row.router % len(self._routers)].append(row)
            row.answers += 1
            if row.arrived >= self._trace.counted_from:
                self._waits.append(self._now - row.arrived)
        for router, theirs in by_router.items():
            load = ReplicaLoad(rows=replica.rows, load_s=self._setting.load_s)
            self._reply(router, replica, theirs, replica.news(router), load, seconds / len(rows))
        self._serve(replica)

    def _reply(
        self, router: int, replica: Replica, rows: Sequence[Row], news: ResidencyChange, load: ReplicaLoad, row_s: float
    ) -> None:
        arrived = self._now + self._setting.hop_s
        self._at(arrived, lambda: self._routers[router].answered(replica, rows, news, load, row_s))

    def _change(self, change: Change) -> None:
        """Replicas go and come; the rows of those that went are sent again."""
        before = self._homes()
        lost: list[Row] = []
        for index in change.gone:
            self._lived_until(index, self._now)
            lost += self._replicas.pop(index).left()
        for index in change.came:
            self._lives[index] += 1
            cache = Cache(self._setting.slots, lru=self._lru)
            name = f"replica {index}, life {self._lives[index]}"
            self._replicas[index] = Replica(index, name, cache, self._truth)
            self._since[index] = self._now
        for router in self._routers:
            router.sync(self._replicas)
        if before:
            moved = sum(home != before[adapter] for adapter, home in self._homes().items())
            changed = len(change.gone) + len(change.came)
            most = max(len(self._replicas), len(self._replicas) + len(change.gone) - len(change.came))
            self._moves.append(moved * most / (len(before) * changed))
        for row in lost:
            self._routers[row.router % len(self._routers)].lost([row])
        for row in lost:
            self._send(row)

    def _homes(self) -> dict[str, int]:
        if not self._replicas:
            return {}
        numbers = range(min(self._setting.adapters, _ASKED_HOMES))
        homes = {f"adapter {number}": self._routers[0].home(f"adapter {number}") for number in numbers}
        return {adapter: home for adapter, home in homes.items() if home is not None}

    def _lived_until(self, index: int, time: float) -> None:
        start = max(self._since[index], self._trace.counted_from)
        self._lived[index] += max(0.0, time - start)


def _routers(policy: str, setting: Setting, truth: Truth) -> Sequence[Router]:
    if policy == "ours":
        return [Ours(setting) for _ in range(setting.routers)]
    return [PEERS[policy](setting, truth)]
