"""Which adapter is asked for when, and which replicas live when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.routing_simulation.setting import Setting

WARM = 1 / 3  # of the time, in which caches fill and nothing is counted


@dataclass(frozen=True)
class Change:
    """At ``time`` these replicas go, and those come, empty."""

    time: float
    gone: Sequence[int] = ()
    came: Sequence[int] = ()


@dataclass(frozen=True)
class Trace:
    """``adapters`` by number, one for each of ``times`` in seconds; ``living``: replicas at the start."""

    times: np.ndarray
    adapters: np.ndarray
    living: int
    changes: Sequence[Change] = ()

    @property
    def counted_from(self) -> float:
        """Seconds."""
        return float(self.times[-1]) * WARM


Make = Callable[[Setting, np.random.Generator], Trace]


def zipf(exponent: float) -> Make:
    """Adapters whose popularity stays."""

    def make(setting: Setting, rng: np.random.Generator) -> Trace:
        return Trace(_arrivals(setting, rng), _drawn(setting, exponent, rng, setting.rows), setting.replicas)

    return make


def shifting(setting: Setting, rng: np.random.Generator) -> Trace:
    """Zipf 1.0, and four times in the counted part all adapters are as popular as others were."""
    ranks = _drawn(setting, 1.0, rng, setting.rows)
    parts = np.array_split(np.arange(setting.rows), 6)
    adapters = np.empty_like(ranks)
    orders = [rng.permutation(setting.adapters) for _ in range(5)]
    for number, part in enumerate(parts):
        adapters[part] = orders[max(0, number - 1)][ranks[part]]
    return Trace(_arrivals(setting, rng), adapters, setting.replicas)


def burst(setting: Setting, rng: np.random.Generator) -> Trace:
    """Zipf 1.0; for a sixth of the time a quarter of all rows asks for one adapter nobody cared for."""
    adapters = _drawn(setting, 1.0, rng, setting.rows)
    middle = slice(setting.rows // 2, setting.rows * 2 // 3)
    chosen = rng.random(setting.rows) < 0.25
    adapters[middle][chosen[middle]] = setting.adapters - 1
    return Trace(_arrivals(setting, rng), adapters, setting.replicas)


def failure(setting: Setting, rng: np.random.Generator) -> Trace:
    """Zipf 1.0; a tenth of the replicas goes, and comes back with nothing in memory."""
    times = _arrivals(setting, rng)
    lost = tuple(range(0, setting.replicas, 10))
    end = float(times[-1])
    changes = (Change(end * 0.5, gone=lost), Change(end * 0.7, came=lost))
    return Trace(times, _drawn(setting, 1.0, rng, setting.rows), setting.replicas, changes)


def growth(setting: Setting, rng: np.random.Generator) -> Trace:
    """Zipf 1.0; four fifths of the replicas are there, and the rest comes later."""
    times = _arrivals(setting, rng)
    first = max(1, setting.replicas * 4 // 5)
    changes = (Change(float(times[-1]) * 0.5, came=range(first, setting.replicas)),)
    return Trace(times, _drawn(setting, 1.0, rng, setting.rows), first, changes)


TRACES: dict[str, Make] = {
    "zipf 1.0": zipf(1.0),
    "zipf 0.9": zipf(0.9),
    "zipf 1.5": zipf(1.5),
    "shifting": shifting,
    "burst": burst,
    "failure": failure,
    "growth": growth,
}


def _arrivals(setting: Setting, rng: np.random.Generator) -> np.ndarray:
    return np.cumsum(rng.exponential(1 / setting.rate, setting.rows))


def _drawn(setting: Setting, exponent: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """True Zipf: the adapter of rank ``r`` has a share in proportion to ``1 / r ** exponent``."""
    shares = 1 / np.arange(1, setting.adapters + 1) ** exponent
    drawn: np.ndarray = rng.choice(setting.adapters, count, p=shares / shares.sum())
    return drawn
