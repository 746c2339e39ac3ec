"""Rows that wait for one replica, in an order that is fair to tenants, and inside a tenant to its adapters."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from adapter_router.routing.shares import Shares
from adapter_router.routing.waiting import Waiting


@dataclass(order=True)
class _Place:
    """In a heap of rows; ``entry`` None once it has gone from the queue."""

    rank: tuple[float, ...]
    entry: Waiting | None = field(compare=False)


@dataclass
class _Tenant:
    """The rows of one, by adapter: of one adapter the most urgent first, then the oldest."""

    adapters: Shares[str | None] = field(default_factory=Shares)
    rows: dict[str | None, list[_Place]] = field(default_factory=dict)


class FairQueue:
    """Costs are row-tokens: what a forward takes is nearly in proportion to them, whoever's adapter it is.

    A row that has waited ``max_wait_s`` goes before everybody's others: a low priority, or a tenant with very many
    adapters, makes it late but never lost.
    """

    def __init__(self, max_wait_s: float, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        """``weight`` of a tenant, above 0: who has twice another's gets twice the tokens while both wait."""
        self.tokens = 0
        self._max_wait_s = max_wait_s
        self._shares: Shares[str] = Shares(weight)
        self._tenants: dict[str, _Tenant] = {}
        self._places: dict[int, tuple[_Place, _Place]] = {}
        self._arrivals: list[_Place] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Rows."""
        return len(self._places)

    @property
    def oldest(self) -> Waiting | None:
        """Who arrived first of those who wait."""
        return _first(self._arrivals)

    def put(self, entry: Waiting) -> None:
        """Add a row, or one that was taken out in vain, in its old place."""
        number = next(self._numbers)
        own = _Place((entry.row.priority, entry.arrived, number), entry)
        arrival = _Place((entry.arrived, number), entry)
        self._places[id(entry)] = own, arrival
        heapq.heappush(self._arrivals, arrival)
        tenant = self._tenants.setdefault(entry.tenant, _Tenant())
        heapq.heappush(tenant.rows.setdefault(entry.digest, []), own)
        tenant.adapters.enter(entry.digest)
        self._shares.enter(entry.tenant)
        self.tokens += entry.tokens

    def pop(self, now: float) -> Waiting | None:
        """Take out whose turn it is; None when nobody waits. It is not charged: it may come back."""
        entry = self.oldest
        if entry is None:
            return None
        if now - entry.arrived < self._max_wait_s:
            name = self._shares.first()
            assert name is not None
            tenant = self._tenants[name]
            entry = _first(tenant.rows[tenant.adapters.first()])
            assert entry is not None
        self.remove(entry)
        return entry

    def charge(self, entry: Waiting) -> None:
        """The row that was taken out runs, for its tenant and its adapter."""
        self._shares.charge(entry.tenant, entry.tokens)
        if entry.tenant in self._tenants:
            self._tenants[entry.tenant].adapters.charge(entry.digest, entry.tokens)

    def remove(self, entry: Waiting) -> None:
        """Take a row out; one that is not here stays away."""
        places = self._places.pop(id(entry), None)
        if places is None:
            return
        for place in places:
            place.entry = None
        self.tokens -= entry.tokens
        tenant = self._tenants[entry.tenant]
        self._shares.leave(entry.tenant)
        tenant.adapters.leave(entry.digest)
        if not tenant.adapters.waits(entry.digest):
            del tenant.rows[entry.digest]
        if not tenant.rows:
            del self._tenants[entry.tenant]
        if len(self._arrivals) > 2 * len(self._places) + 1000:  # rows that left from the middle
            self._arrivals = [place for place in self._arrivals if place.entry is not None]
            heapq.heapify(self._arrivals)


def _first(places: list[_Place]) -> Waiting | None:
    while places and places[0].entry is None:
        heapq.heappop(places)
    return places[0].entry if places else None
