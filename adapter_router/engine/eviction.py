"""What an adapter is worth keeping: how often rows use it and what it costs to load, for the bytes it takes.

Uses fade with every use that follows, anybody's, so yesterday's favourite goes. They are remembered of adapters that
are not in memory, too: one that is asked for often comes back as what it was, and one that is asked for once does not
drive out the others (GDSF, Cherkasova 1998; TinyLFU, Einziger et al. 2017). Pure bookkeeping, no clock, no torch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

_REMEMBERED = 10_000
_HALF_LIFE = 16  # uses for each adapter on the device, after which an old use counts half: benchmarks/policies.py
_SHORTEST = 64.0
_USUAL_S = 0.05
_MOST_COST = 4.0  # a load counts as at most so many usual ones, or so small a part: hanging is no merit
_SMOOTHING = 0.1


@dataclass
class _Known:
    """``uses``: binary logarithm of the count, in uses of the time when the first of all was made.

    ``cost``: binary logarithm of seconds per byte.
    """

    uses: float
    cost: float


class Popularity:
    """Worth of adapters by digest; comparable with each other whenever it is asked. Not thread-safe."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        """``remembered``: digests kept in mind, those used last."""
        self._remembered = remembered
        self._half_life = _SHORTEST
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._time = 0.0  # uses of anybody, in half-lives
        self._usual_s = _USUAL_S
        self._usual_cost = 0.0

    def sized(self, adapters: int) -> None:
        """So many are kept: the more, the rarer is each one's next use, and the longer must uses be remembered."""
        self._half_life = max(_SHORTEST, float(_HALF_LIFE * adapters))

    def used(self, digest: str, uses: int = 1) -> None:
        """Rows of a batch asked for the adapter."""
        self._time += uses / self._half_life
        # Instead of all others growing smaller, a new use is larger than the ones before.
        new = self._time + math.log2(uses)
        known = self._known.get(digest)
        if known is None:
            self._remember(digest, _Known(new, self._usual_cost))
            return
        known.uses = max(new, known.uses) + math.log2(1 + 2 ** -abs(new - known.uses))
        self._known.move_to_end(digest)

    def loaded(self, digest: str, num_bytes: int, seconds: float) -> None:
        """The adapter was loaded once more."""
        self._usual_s += _SMOOTHING * (seconds - self._usual_s)
        seconds = min(max(seconds, self._usual_s / _MOST_COST), self._usual_s * _MOST_COST)
        cost = math.log2(max(seconds, 1e-6) / max(num_bytes, 1))
        self._usual_cost += (_SMOOTHING if self._usual_cost else 1.0) * (cost - self._usual_cost)
        if digest not in self._known:
            self._remember(digest, _Known(-math.inf, cost))
        self._known[digest].cost = cost

    def worth(self, digest: str) -> float:
        """Larger for what should stay; -inf for what nobody has asked for."""
        known = self._known.get(digest)
        return -math.inf if known is None else known.uses + known.cost

    def _remember(self, digest: str, known: _Known) -> None:
        self._known[digest] = known
        while len(self._known) > self._remembered:
            self._known.popitem(last=False)
