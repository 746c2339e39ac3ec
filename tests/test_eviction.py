"""What adapters are worth: faded uses, whatever the order and the number of them, times cost over bytes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from adapter_router.engine.eviction import Popularity
from benchmarks.policies import SMALL, Lru, Ours, Workload, hit_rate, ideal

_USES = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 64)), min_size=1, max_size=200)


@settings(max_examples=200, deadline=None)
@given(_USES)
def test_worth_is_the_count_of_faded_uses(uses: list[tuple[str, int]]) -> None:
    popularity = Popularity()
    counts: dict[str, float] = {}
    for digest, rows in uses:
        popularity.used(digest, rows)
        counts = {known: count * 0.5 ** (rows / 64) for known, count in counts.items()}
        counts[digest] = counts.get(digest, 0.0) + rows
    worths = {digest: popularity.worth(digest) for digest in counts}
    for one in counts:
        for other in counts:
            expected = math.log2(counts[one] / counts[other])
            assert worths[one] - worths[other] == pytest.approx(expected, abs=1e-6)


def test_millions_of_uses_overflow_nothing() -> None:
    popularity = Popularity()
    for _ in range(20_000):
        popularity.used("busy", 10_000)
    popularity.used("new")
    assert math.isfinite(popularity.worth("busy")) and popularity.worth("busy") > popularity.worth("new")


def test_cost_counts_and_bytes_count() -> None:
    popularity = Popularity()
    for digest, num_bytes, seconds in (("usual", 100, 0.05), ("large", 400, 0.05), ("slow", 100, 0.1)):
        popularity.used(digest, 4)
        popularity.loaded(digest, num_bytes, seconds)
    assert popularity.worth("large") < popularity.worth("usual") < popularity.worth("slow")


def test_a_load_that_hung_is_no_merit() -> None:
    popularity = Popularity()
    for number in range(50):
        popularity.loaded(f"usual{number}", 100, 0.05)
    for digest, seconds in (("hung", 60.0), ("usual", 0.05)):
        popularity.used(digest, 4)
        popularity.loaded(digest, 100, seconds)
    assert popularity.worth("hung") - popularity.worth("usual") < math.log2(600 / 5)


def test_memory_is_bounded_and_what_is_forgotten_starts_anew() -> None:
    popularity = Popularity(remembered=100)
    popularity.used("old", 1000)
    popularity.loaded("old", 100, 0.05)
    for number in range(5000):
        popularity.used(f"once{number}")
    assert len(popularity._known) == 100
    assert popularity.worth("old") == -math.inf
    popularity.loaded("again", 100, 0.05)
    for digest in ("old", "again"):
        popularity.used(digest)
    assert popularity.worth("old") == pytest.approx(popularity.worth("again"), abs=0.1), "at the usual cost"


@pytest.mark.parametrize("name", [name for name in SMALL if name != "shifts every 250"])
def test_more_rows_hit_than_with_the_least_recently_used(name: str) -> None:
    """Pure and seeded; how much more is what ``benchmarks/policies.py`` tells."""
    workload = SMALL[name]
    ours, lru = (sum(hit_rate(policy, workload, 4, 2, seed) for seed in range(3)) / 3 for policy in (Ours, Lru))
    assert lru + 0.04 < ours < ideal(workload, 8) + 0.01


def test_a_new_favourite_takes_the_place_of_the_old_one() -> None:
    cache = Ours(4)
    for name in "abcd" * 500:
        cache.request(name, 1)
    hits = [cache.request(name, 1) for name in "wxyz" * 60]
    assert not any(hits[:4]) and all(hits[-40:])


def test_a_scan_in_batches_flushes_nobody() -> None:
    workload = Workload(batch=16, scan=0.5)
    rates = [hit_rate(Ours, workload, 4, 2, seed) for seed in range(3)]
    assert min(rates) > 0.55
