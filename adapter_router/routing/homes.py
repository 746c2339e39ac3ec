"""Which replicas an adapter belongs to, by rendezvous hashing: routers that never talk find the same ones.

Weighted rendezvous (highest random weight) hashing: Thaler and Ravishankar 1998; weights as in Schindelhauer and
Schomaker 2005: the score of a replica of weight ``w`` is ``-w / ln u``, ``u`` drawn from the hash of both names.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

_KEPT = 16  # homes of one adapter that are remembered
_REMEMBERED = 1 << 16  # adapters


class Homes:
    """Replicas by name, each with a weight; a change moves those adapters alone that gain or lose by it."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._keys = np.empty(0, dtype=np.uint64)
        self._weights = np.empty(0)
        self._uneven = False
        self._ranked: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def sync(self, weights: Mapping[str, float]) -> None:
        """Let these be the replicas, with shares of the adapters in proportion to their weights, which are above 0."""
        names = tuple(sorted(weights))
        values = np.array([weights[name] for name in names])
        if names == self._names and np.array_equal(values, self._weights):
            return
        self._names, self._weights, self._uneven = names, values, len(set(weights.values())) > 1
        self._keys = np.array([_hash(name) for name in names], dtype=np.uint64)
        self._ranked.clear()

    def of(self, digest: str, count: int) -> tuple[str, ...]:
        """The first ``count`` homes of an adapter, best first; all of them where there are fewer."""
        if count > _KEPT:
            return self._rank(digest, count)
        ranked = self._ranked.get(digest)
        if ranked is None:
            ranked = self._ranked[digest] = self._rank(digest, _KEPT)
            if len(self._ranked) > _REMEMBERED:
                self._ranked.popitem(last=False)
        else:
            self._ranked.move_to_end(digest)
        return ranked[:count]

    def _rank(self, digest: str, count: int) -> tuple[str, ...]:
        scores = _mixed(self._keys ^ np.uint64(_hash(digest)))
        if self._uneven:  # else the score grows with ``u``, and whole numbers do
            scores = self._weights / -np.log((scores.astype(np.float64) + 0.5) / (1 << 53))
        count = min(count, len(scores))
        best = np.argpartition(scores, len(scores) - count)[len(scores) - count :] if count else np.empty(0, dtype=int)
        ordered = best[np.argsort(scores[best], kind="stable")[::-1]]
        return tuple([self._names[index] for index in ordered.tolist()])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _mixed(keys: np.ndarray) -> np.ndarray:
    """53 well-mixed bits of 64-bit keys, which it overwrites: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    keys += np.uint64(0x9E3779B97F4A7C15)
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    keys >>= np.uint64(11)
    return keys
