"""Rows that wait for one replica, in an order that is fair to tenants, and inside a tenant to its adapters."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field

from adapter_router.routing.shares import Shares
from adapter_router.routing.waiting import Waiting

_SLACK = 64  # rows that have gone and a heap may still hold
_MOST_PASSES = 32  # more than there are kinds of length: it bites only where a tenant's turn never begins a batch


@dataclass(eq=False, slots=True)
class _Place:
    """``passes``: in how many looks another row went before it, though it was its turn; ``look``: the last of them."""

    entry: Waiting
    number: int
    gone: bool = False
    passes: int = 0
    look: int = 0


class _Line:
    """A heap of rows, from which some have gone."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, float, int, _Place]] = []
        self._present = 0

    def __len__(self) -> int:
        """Entries, of those that have gone as well."""
        return len(self._heap)

    def put(self, priority: float, place: _Place) -> None:
        heapq.heappush(self._heap, (priority, place.entry.arrived, place.number, place))
        self._present += 1

    def first(self) -> tuple[float, float, int, _Place] | None:
        while self._heap and self._heap[0][3].gone:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def lost_one(self) -> bool:
        """Whether it was the last."""
        self._present -= 1
        if len(self._heap) > 2 * self._present + _SLACK:
            self._heap = [item for item in self._heap if not item[3].gone]
            heapq.heapify(self._heap)
        return not self._present


class _Flow:
    """The rows of one tenant and adapter: the most urgent first, then the oldest; in lines of like length."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._arrivals = _Line()
        self._late: Waiting | None = None  # who was offered out of its turn
        self._for_the_late = True

    def put(self, place: _Place) -> None:
        self._lines.setdefault(_kind(place.entry), _Line()).put(place.entry.row.priority, place)
        self._arrivals.put(0, place)

    def lost_one(self, entry: Waiting) -> bool:
        """Whether it was the last."""
        if self._lines[_kind(entry)].lost_one():
            del self._lines[_kind(entry)]
        return self._arrivals.lost_one()

    def next(self, late: float) -> list[_Place]:
        """Whose turn it is, then the first of other lengths, in order.

        Every second turn belongs to the oldest if it has come before ``late``, whatever its priority.
        """
        heads = [head[3] for head in sorted(filter(None, [line.first() for line in self._lines.values()]))]
        oldest = self._arrivals.first()
        if self._for_the_late and oldest is not None and oldest[1] <= late and oldest[3] is not heads[0]:
            self._late = oldest[3].entry
            return [oldest[3], *heads]
        return heads

    def charged(self, entry: Waiting) -> None:
        self._for_the_late = entry is not self._late


@dataclass(eq=False)
class _Tenant:
    adapters: Shares[str] = field(default_factory=Shares)
    flows: dict[str, _Flow] = field(default_factory=dict)


class FairQueue:
    """Costs are row-tokens: what a forward takes is nearly in proportion to them, whoever's adapter it is.

    Nobody waits for ever: a tenant that is not served becomes the one with the lowest counter, so does an adapter of a
    tenant; in between those of one tenant and adapter every second turn is for who has waited ``max_wait_s``, whatever
    its priority. (Were that so between tenants, an overload would make first come, first served of it: everything that
    waits would be late.) Nobody of its tenant overtakes a row that was passed over for its length in 32 looks.
    """

    def __init__(self, max_wait_s: float, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        """``weight`` of a tenant, above 0: who has twice another's gets twice the tokens while both wait."""
        self.tokens = 0
        self._max_wait_s = max_wait_s
        self._shares: Shares[str] = Shares(weight)
        self._tenants: dict[str, _Tenant] = {}
        self._places: dict[Waiting, _Place] = {}
        self._arrivals = _Line()
        self._numbers = itertools.count()
        self._looks = itertools.count(1)

    def __len__(self) -> int:
        """Rows."""
        return len(self._places)

    @property
    def oldest(self) -> Waiting | None:
        """Who arrived first of those who wait."""
        first = self._arrivals.first()
        return first[3].entry if first else None

    def put(self, entry: Waiting) -> None:
        """Add a row, behind those of its tenant, adapter and priority that arrived no later; once only."""
        if entry in self._places:
            return
        key = entry.digest or ""
        place = self._places[entry] = _Place(entry, next(self._numbers))
        self._arrivals.put(0, place)
        tenant = self._tenants.setdefault(entry.tenant, _Tenant())
        tenant.flows.setdefault(key, _Flow()).put(place)
        tenant.adapters.enter(key)
        self._shares.enter(entry.tenant)
        self.tokens += entry.tokens

    def pop(self, now: float) -> Waiting | None:
        """Take out whose turn it is; None when nobody waits. It is not charged."""
        with closing(self.pops(now, lambda _: True, 1)) as turns:
            return next(turns, None)

    def pops(self, now: float, fits: Callable[[Waiting], bool], most: int) -> Generator[Waiting, None, None]:
        """Take rows out, in order; to be closed. Who runs one charges it before the next; nothing is put meanwhile.

        Rows that do not fit keep their places, and their tenants what they are owed. Of a tenant and adapter the first
        of each length is asked; it ends when ``most`` tenants had none.
        """
        look = next(self._looks)
        seen: list[Shares[str]] = []
        try:
            while most and (name := self._shares.first()) is not None:
                tenant = self._tenants[name]
                seen.append(tenant.adapters)
                place = self._next(tenant, now, fits, look)
                if place is None:
                    self._shares.pass_over()
                    most -= 1
                else:
                    self.remove(place.entry)
                    yield place.entry
        finally:
            for shares in (self._shares, *seen):
                shares.resume()

    def charge(self, entry: Waiting) -> None:
        """The row that was taken out runs, for its tenant and its adapter."""
        self._shares.charge(entry.tenant, entry.tokens)
        tenant, key = self._tenants.get(entry.tenant), entry.digest or ""
        if tenant is not None:
            tenant.adapters.charge(key, entry.tokens)
            if key in tenant.flows:
                tenant.flows[key].charged(entry)

    def remove(self, entry: Waiting) -> None:
        """Take a row out; one that is not here stays away."""
        place = self._places.pop(entry, None)
        if place is None:
            return
        place.gone = True
        self.tokens -= entry.tokens
        self._arrivals.lost_one()
        tenant, key = self._tenants[entry.tenant], entry.digest or ""
        if tenant.flows[key].lost_one(entry):
            del tenant.flows[key]
        if not tenant.flows:
            del self._tenants[entry.tenant]
        self._shares.leave(entry.tenant)
        tenant.adapters.leave(key)

    def _next(self, tenant: _Tenant, now: float, fits: Callable[[Waiting], bool], look: int) -> _Place | None:
        """The row of ``tenant`` whose turn it is, of those that fit."""
        while (key := tenant.adapters.first()) is not None:
            first, *others = tenant.flows[key].next(now - self._max_wait_s)
            if fits(first.entry):
                return first
            if first.look != look:
                first.look = look
                first.passes += 1
            if first.passes > _MOST_PASSES:
                return None
            for place in others:
                if fits(place.entry):
                    return place
            tenant.adapters.pass_over()
        return None


def _kind(entry: Waiting) -> int:
    """Of length: rows of one kind differ by less than half."""
    return (entry.tokens * entry.tokens).bit_length()
