"""Replicas without a model: what is in their memory is decided by the engine's own books, time is only counted."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from adapter_router.engine.eviction import Popularity
from adapter_router.engine.slots import SlotTable
from adapter_router.routing.replica_state import ReplicaState
from adapter_router.types import ResidencyChange


@dataclass(eq=False, slots=True)
class Row:
    """``state`` and ``cold``: what its router has noted with its fleet, where that is ours."""

    adapter: str
    router: int
    arrived: float
    state: ReplicaState | None = None
    cold: str | None = None
    answers: int = 0


class Truth:
    """Of all replicas by index, as it is just now: rows they have, room for more adapters, and who has which.

    ``rows`` are infinite where nobody lives.
    """

    def __init__(self, replicas: int) -> None:
        self.rows = np.full(replicas, np.inf)
        self.room = np.zeros(replicas, dtype=bool)
        self.held: defaultdict[str, set[int]] = defaultdict(set)
        self.coming: defaultdict[str, set[int]] = defaultdict(set)


class Cache:
    """Room for some adapters of one size, evicted as the engine does, or the least recently used first."""

    def __init__(self, slots: int, *, lru: bool) -> None:
        self._slots = slots
        self._popularity = None if lru else Popularity()
        self._table = SlotTable(slots, self._popularity.worth if self._popularity else None)

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._table

    def asked(self, adapter: str) -> None:
        """A row of it has come."""
        if self._popularity is not None:
            self._popularity.used(adapter)

    def lease(self, adapter: str) -> None:
        """A row of it waits or runs: it stays."""
        self._table.lease(adapter)

    def release(self, adapter: str) -> None:
        """The row has been answered."""
        self._table.release(adapter)

    def adapters(self) -> list[str]:
        """All that are here."""
        return self._table.resident()

    @property
    def has_room(self) -> bool:
        """Whether one more fits without anybody going."""
        return len(self._table) < self._slots

    def install(self, adapter: str) -> list[str] | None:
        """Who had to go; None where all are in use."""
        victims = self._table.room_for(1)
        if victims is not None:
            for victim in victims:
                self._table.remove(victim)
            self._table.add(adapter, 1)
            if self._popularity is not None:
                self._popularity.sized(len(self._table))
        return victims


@dataclass(eq=False)
class Replica:
    """One life of the replica at ``index``. ``ready``: rows whose adapter is here; ``waiting``: by what they wait for.

    ``rows``: taken and not answered. ``log``: adapters that came or went, one after the other; ``told``: how much of it
    each router knows.
    """

    index: int
    name: str
    cache: Cache
    truth: Truth
    rows: int = 0
    ready: deque[Row] = field(default_factory=deque)
    running: list[Row] = field(default_factory=list)
    waiting: dict[str, list[Row]] = field(default_factory=dict)
    to_load: deque[str] = field(default_factory=deque)
    loading: str | None = None
    loaded: str | None = None  # and there is no room for it yet
    alive: bool = True
    log: list[str] = field(default_factory=list)
    told: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.truth.rows[self.index] = 0
        self.truth.room[self.index] = True

    def take(self, row: Row) -> bool:
        """Whether its adapter was there."""
        self._count(1)
        self.cache.asked(row.adapter)
        if row.adapter in self.cache:
            self.cache.lease(row.adapter)
            self.ready.append(row)
            return True
        if row.adapter not in self.waiting:
            self.waiting[row.adapter] = []
            self.to_load.append(row.adapter)
            self.truth.coming[row.adapter].add(self.index)
        self.waiting[row.adapter].append(row)
        return False

    def install(self) -> bool:
        """Bring in what has been loaded, if there is room."""
        if self.loaded is None:
            return False
        victims = self.cache.install(self.loaded)
        if victims is None:
            return False
        self.log += [*victims, self.loaded]
        for victim in victims:
            self.truth.held[victim].discard(self.index)
        self.truth.held[self.loaded].add(self.index)
        self.truth.coming[self.loaded].discard(self.index)
        self.truth.room[self.index] = self.cache.has_room
        rows = self.waiting.pop(self.loaded)
        for row in rows:
            self.cache.lease(row.adapter)
        self.ready.extend(rows)
        self.loaded = None
        return True

    def finish(self) -> list[Row]:
        """The running batch is over."""
        rows, self.running = self.running, []
        for row in rows:
            self.cache.release(row.adapter)
        self._count(-len(rows))
        return rows

    def left(self) -> list[Row]:
        """Rows that nobody is going to answer, because it has died."""
        self.alive = False
        self.truth.rows[self.index] = np.inf
        self.truth.room[self.index] = False
        for adapter in self.cache.adapters():
            self.truth.held[adapter].discard(self.index)
        for adapter in self.waiting:
            self.truth.coming[adapter].discard(self.index)
        return [*self.running, *self.ready, *(row for rows in self.waiting.values() for row in rows)]

    def news(self, router: int) -> ResidencyChange:
        """What that router has not been told yet."""
        touched = frozenset(self.log[self.told[router] :])
        self.told[router] = len(self.log)
        added = frozenset(adapter for adapter in touched if adapter in self.cache)
        return ResidencyChange(len(self.log), added, touched - added)

    def _count(self, more: int) -> None:
        self.rows += more
        self.truth.rows[self.index] = self.rows
