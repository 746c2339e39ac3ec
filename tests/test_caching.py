"""Dispatcher, affinity and eviction together, in virtual time: how many loads they need for the requests they get."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.caching.traces import Workload, clairvoyant_loads, known_popularity_loads, scan, shifting, zipf
from benchmarks.caching.virtual import measure

SEEDS = range(4)


def hit_rate(contender: str, workload: Workload) -> float:
    return statistics.mean(measure(contender, workload.trace(seed)).hit_rate for seed in SEEDS)


@pytest.mark.parametrize("workload", [zipf(0.9), zipf(1.0), zipf(1.5), shifting(), scan()], ids=lambda one: one.name)
def test_fewer_loads_than_hashing_and_the_least_recently_used(workload: Workload) -> None:
    assert hit_rate("ours", workload) > hit_rate("lru", workload) > hit_rate("multiplexed", workload)


def test_as_few_loads_as_if_the_eight_most_popular_were_always_there() -> None:
    assert hit_rate("ours", zipf(1.0)) > 0.72


def test_virtual_time_gives_the_same_every_time() -> None:
    trace = zipf(1.0).trace(0)
    assert measure("ours", trace) == measure("ours", trace)


@given(st.lists(st.sampled_from("abcde"), max_size=9), st.integers(1, 3))
def test_nobody_needs_fewer_loads_than_the_clairvoyant(trace: Sequence[str], slots: int) -> None:
    fewest = len(clairvoyant_loads(trace, slots))
    assert fewest == _fewest(trace, slots)
    assert fewest <= len(known_popularity_loads(trace, slots)) <= len(trace)


def _fewest(trace: Sequence[str], slots: int) -> int:
    """Every way to evict, tried out."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for name in trace:
        following: dict[frozenset[str], int] = {}
        for held, loads in states.items():
            kept = (
                [held] if name in held or len(held) < slots else map(frozenset, itertools.combinations(held, slots - 1))
            )
            for rest in kept:
                state = frozenset({*rest, name})
                following[state] = min(following.get(state, 1 << 30), loads + (name not in held))
        states = following
    return min(states.values())
