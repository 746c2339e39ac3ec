"""Which replicas hold each adapter or are loading it: an index by adapter, so that nobody looks at all replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np


class Placed(Protocol):
    """A replica that has a place among all."""

    place: int


Replica = TypeVar("Replica", bound=Placed)


@dataclass
class _Ranking:
    """``order``: all places in the adapter's home order. ``held``: by place, whether a copy is there."""

    order: np.ndarray
    held: np.ndarray


class Copies(Generic[Replica]):
    """Replicas by adapter, in the order in which they got it."""

    def __init__(self) -> None:
        self._replicas: dict[str, list[Replica]] = {}
        self._rankings: dict[str, _Ranking] = {}
        self._places = 0

    def of(self, digest: str) -> Sequence[Replica]:
        """Who has a copy; not to be changed."""
        return self._replicas.get(digest, ())

    def ranked(self, digest: str, rank: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All places in home order, and which of them have a copy, in that order.

        ``rank`` finds the order. It is remembered, so ask for adapters with very many copies only.
        """
        ranking = self._rankings.get(digest)
        if ranking is None:
            held = np.zeros(self._places, dtype=bool)
            held[[replica.place for replica in self.of(digest)]] = True
            ranking = self._rankings[digest] = _Ranking(rank(digest), held)
        return ranking.order, ranking.held[ranking.order]

    def add(self, digest: str, replica: Replica) -> None:
        """It has a copy from now on, or had one."""
        replicas = self._replicas.setdefault(digest, [])
        if replica not in replicas:
            replicas.append(replica)
            self._mark(digest, replica, held=True)

    def discard(self, digest: str, replica: Replica) -> None:
        """It has no copy from now on, or had none."""
        replicas = self._replicas.get(digest, [])
        if replica in replicas:
            replicas.remove(replica)
            self._mark(digest, replica, held=False)
            if not replicas:
                del self._replicas[digest]

    def moved(self, places: int) -> None:
        """All replicas have new places, so many."""
        self._places = places
        self._rankings.clear()

    def _mark(self, digest: str, replica: Replica, *, held: bool) -> None:
        ranking = self._rankings.get(digest)
        if ranking is not None:
            ranking.held[replica.place] = held
            if not self._replicas[digest]:
                del self._rankings[digest]
