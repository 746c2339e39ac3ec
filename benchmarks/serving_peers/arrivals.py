"""Who asks for what, and when: Poisson or bursts, adapters by true Zipf(1.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.serving_peers.adapters import name_of
from deployments.demo.tenants import SAMPLES

Pattern = Literal["poisson", "bursts"]
PATTERNS: tuple[Pattern, ...] = ("poisson", "bursts")
TEXTS = tuple(text for texts in SAMPLES.values() for text in texts)
_CYCLE_S = 2.0
_BURST = 0.25  # of each cycle
_RATE_IN_BURST = 2.5  # times the mean; outside it is half the mean


@dataclass(frozen=True)
class Arrival:
    """One request: ``rows`` texts (numbers in TEXTS) for one adapter, ``at`` seconds after the start."""

    at: float
    adapter: str
    texts: tuple[int, ...]


def draw(pattern: Pattern, rate: float, seconds: float, adapters: int, rows: int, seed: int) -> list[Arrival]:
    """``rate`` requests a second on average, of ``rows`` rows each."""
    rng = np.random.default_rng(seed)
    times = _times(pattern, rate, seconds, rng)
    shares = 1 / np.arange(1, adapters + 1)
    asked = rng.choice(adapters, len(times), p=shares / shares.sum())
    texts = rng.integers(len(TEXTS), size=(len(times), rows))
    return [
        Arrival(float(at), name_of(int(adapter)), tuple(int(text) for text in numbers))
        for at, adapter, numbers in zip(times, asked, texts, strict=True)
    ]


def _times(pattern: Pattern, rate: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Of a Poisson process; that of bursts is one of the highest rate with some arrivals left out (thinning)."""
    highest = rate if pattern == "poisson" else _RATE_IN_BURST * rate
    times = np.sort(rng.uniform(0, seconds, rng.poisson(highest * seconds)))
    if pattern == "poisson":
        return times
    elsewhere = (1 - _BURST * _RATE_IN_BURST) / (1 - _BURST)
    kept = np.where(times % _CYCLE_S < _BURST * _CYCLE_S, 1.0, elsewhere / _RATE_IN_BURST)
    return times[rng.uniform(size=len(times)) < kept]
