"""Whose turn it is: the virtual token counters of Sheng et al. (OSDI 2024, arXiv:2401.00588), for anything with a cost.

Everybody who waits has a counter of what was done for them, over their weight; the lowest is next. Who comes back
after a pause starts at the lowest counter of those who wait: what was not asked for then is not owed. Between any two
that wait all the time, what is done for them differs by at most two of the largest pieces of work.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_SLACK = 64  # entries a structure may hold for nothing before it is looked through


class Shares(Generic[Key]):
    """Counters by key, of those who wait and of those who are still ahead of them."""

    def __init__(self, weight: Callable[[Key], float] = lambda _: 1.0) -> None:
        """``weight`` above 0: who has twice another's gets twice as much done while both wait."""
        self._weight = weight
        self._done: dict[Key, float] = {}
        self._waiting: Counter[Key] = Counter()
        self._order: list[tuple[float, int, Key]] = []  # a counter there may be older than in ``_done``
        self._listed: set[Key] = set()  # in ``_order`` or ``_passed``, whether they wait or not
        self._passed: list[tuple[float, int, Key]] = []
        self._pushed = 0
        self._floor = 0.0  # the lowest counter of those who wait, as last seen; of the last one when nobody does
        self._most_done = _SLACK

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def waits(self, key: Key) -> bool:
        """Whether anything waits for ``key``."""
        return key in self._waiting

    def enter(self, key: Key) -> None:
        """One more thing waits for ``key``."""
        if key not in self._waiting:
            lowest = self.first()
            if lowest is not None:
                self._floor = self._done[lowest]
            self._done[key] = max(self._done.get(key, 0.0), self._floor)
            if key not in self._listed:
                self._push(key)
        self._waiting[key] += 1

    def leave(self, key: Key) -> None:
        """One thing less waits for ``key``."""
        self._waiting[key] -= 1
        if self._waiting[key]:
            return
        del self._waiting[key]
        if not self._waiting:
            self._floor = self._done[key]
        if len(self._done) > self._most_done:  # nothing is owed to who is not ahead of the others
            self._done = {key: done for key, done in self._done.items() if key in self._waiting or done > self._floor}
            self._most_done = 2 * len(self._done) + _SLACK  # each look through is paid for by as many that left
        if len(self._order) > 2 * len(self._waiting) + _SLACK:
            self._order = [place for place in self._order if place[2] in self._waiting]
            heapq.heapify(self._order)
            self._listed = {place[2] for place in self._order + self._passed}

    def charge(self, key: Key, cost: float) -> None:
        """So much, in any unit, was done for ``key``, whether anything waits for it or not."""
        self._done[key] = max(self._done.get(key, 0.0), self._floor) + cost / self._weight(key)

    def first(self) -> Key | None:
        """Whose turn it is: of equals, who waits longest; None when nobody waits who was not passed over."""
        while self._order:
            counter, _, key = self._order[0]
            if key in self._waiting and counter == self._done[key]:
                return key
            heapq.heappop(self._order)
            self._listed.discard(key)
            if key in self._waiting:
                self._push(key)
        return None

    def pass_over(self) -> None:
        """``first`` is the next one's, until ``resume``; nobody may enter before that."""
        if self.first() is not None:
            self._passed.append(heapq.heappop(self._order))

    def resume(self) -> None:
        """Those who were passed over have their places again."""
        for place in self._passed:
            heapq.heappush(self._order, place)
        self._passed.clear()

    def _push(self, key: Key) -> None:
        self._pushed += 1
        self._listed.add(key)
        heapq.heappush(self._order, (self._done[key], self._pushed, key))
