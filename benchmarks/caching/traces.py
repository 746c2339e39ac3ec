"""Which adapters are asked for, one after the other, and how few loads anybody could need for them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ADAPTERS = 24
_REQUESTS = 600
_ONE_OFFS = 200
_DRIFT_REQUESTS = 1200
_DRIFT_EVERY = 50
_ONE_OFF = "once"
_NEVER = 1 << 60


@dataclass(frozen=True)
class Workload:
    """``trace``: the adapters asked for, given a seed; every seed has adapters of its own.

    ``exponent``: of the adapters' popularity, where it stays.
    """

    name: str
    trace: Callable[[int], list[str]]
    exponent: float | None = None


def popularity(exponent: float, adapters: int = _ADAPTERS) -> list[float]:
    """Shares of the requests by rank, true Zipf; they sum to 1."""
    weights = [1 / rank**exponent for rank in range(1, adapters + 1)]
    return [weight / sum(weights) for weight in weights]


def zipf(exponent: float) -> Workload:
    """Adapters whose popularity stays."""

    def trace(seed: int) -> list[str]:
        return _draw(random.Random(seed), exponent, _REQUESTS, _names(seed))

    return Workload(f"zipf{exponent:.1f}", trace, exponent)


def shifting() -> Workload:
    """Zipf(1.0) whose ranks move on by one every 50 requests, once around: the last becomes the first."""

    def trace(seed: int) -> list[str]:
        rng, names, asked = random.Random(seed), _names(seed), list[str]()
        while len(asked) < _DRIFT_REQUESTS:
            asked += _draw(rng, 1.0, _DRIFT_EVERY, names)
            names = [names[-1], *names[:-1]]
        return asked

    return Workload("shifting", trace)


def scan() -> Workload:
    """Zipf(1.0), and in its middle third every other request is for an adapter nobody else ever asks for."""

    def trace(seed: int) -> list[str]:
        asked = _draw(random.Random(seed), 1.0, _REQUESTS, _names(seed))
        start = (_REQUESTS - _ONE_OFFS) // 2
        for index in range(_ONE_OFFS):
            asked.insert(start + 2 * index, f"{_ONE_OFF}{seed}-{index:03}")
        return asked

    return Workload("scan", trace, 1.0)


def is_one_off(name: str) -> bool:
    """Whether no policy could have it loaded: nobody asks twice."""
    return name.startswith(_ONE_OFF)


def clairvoyant_loads(trace: Sequence[str], slots: int) -> list[str]:
    """What one cache of ``slots`` would load that knows the future (Belady 1966): the fewest possible in this order.

    Every adapter takes a slot to run; evicted is who is asked for again last.
    """
    following = [_NEVER] * len(trace)
    next_use: dict[str, int] = {}
    for index in range(len(trace) - 1, -1, -1):
        following[index] = next_use.get(trace[index], _NEVER)
        next_use[trace[index]] = index
    return _loads(trace, slots, lambda index: following[index])


def known_popularity_loads(trace: Sequence[str], slots: int) -> list[str]:
    """What one cache of ``slots`` would load that knows how often each adapter is asked for, but not when."""
    counts = Counter(trace)
    return _loads(trace, slots, lambda index: -counts[trace[index]])


def _loads(trace: Sequence[str], slots: int, dispensable: Callable[[int], int]) -> list[str]:
    """``dispensable``, of the request at an index: evicted is whose last request has the largest."""
    cached: dict[str, int] = {}
    loads = []
    for index, name in enumerate(trace):
        if name not in cached:
            loads.append(name)
            if len(cached) == slots:
                del cached[max(cached, key=lambda held: cached[held])]
        cached[name] = dispensable(index)
    return loads


def _draw(rng: random.Random, exponent: float, count: int, names: Sequence[str]) -> list[str]:
    """``count`` requests; ``names`` by rank."""
    return rng.choices(names, popularity(exponent), k=count)


def _names(seed: int) -> list[str]:
    return [f"adapter{seed}-{rank:02}" for rank in range(_ADAPTERS)]
