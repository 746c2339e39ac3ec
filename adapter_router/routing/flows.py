"""How long rows of one tenant for one adapter wait in an overload: longest where most is asked for.

Turns are shared by adapters as they are by tenants. While much waits, what is asked for more than its turn allows waits
for its own turns, whatever the average is; who lets it in all the same has it wait in vain.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

_HALF_LIFE_S = 1.0
_KNOWN_S = 0.5  # of turns, before they say anything
_PAUSE_S = 2.0  # without one, after which they say nothing any more: a load, or a replica that was lost
_FADE = math.log(2) / _HALF_LIFE_S


@dataclass
class _Flow:
    tokens: int = 0
    since: float = -math.inf  # the first turn of those that say something
    served: float = 0.0  # in the turns after it, the older the less
    then: float = -math.inf  # the last one

    def faded(self, now: float) -> float:
        return self.served * math.exp(-_FADE * (now - self.then))


class Flows:
    """Tokens that wait, and those that are served, by flow. A flow of which nothing waits is forgotten."""

    def __init__(self) -> None:
        self._flows: dict[Hashable, _Flow] = {}

    def __len__(self) -> int:
        """Flows of which something waits."""
        return len(self._flows)

    def entered(self, key: Hashable, tokens: int) -> None:
        """So many more wait."""
        self._flows.setdefault(key, _Flow()).tokens += tokens

    def left(self, key: Hashable, tokens: int, now: float, served: bool) -> None:
        """So many wait no more; ``served``: rather than given up."""
        flow = self._flows[key]
        flow.tokens -= tokens
        if served and now - flow.then > _PAUSE_S:
            flow.since, flow.served, flow.then = now, 0.0, now
        elif served:
            flow.served, flow.then = flow.faded(now) + tokens, now
        if not flow.tokens:
            del self._flows[key]

    def wait_s(self, key: Hashable, more: int, now: float) -> float:
        """Seconds until ``more`` tokens would be served after those that wait, at the rate of its turns so far.

        0 where that is not known: it has had no turns for half a second yet, or none for two seconds.
        """
        flow = self._flows.get(key)
        if flow is None or now - flow.since < _KNOWN_S or now - flow.then > _PAUSE_S or not flow.served:
            return 0.0
        window = (1 - math.exp(-_FADE * (now - flow.since))) / _FADE
        return (flow.tokens + more) * window / flow.faded(now)
