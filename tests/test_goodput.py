"""What decides the end-to-end benchmark: arrivals, the search for a rate, and quantiles of what was never answered."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.serving_peers.arrivals import PATTERNS, Arrival, Pattern, draw
from benchmarks.serving_peers.open_loop import Outcome, offer
from benchmarks.serving_peers.search import Search


@pytest.mark.parametrize("capacity", [3.0, 40.0, 777.0])
def test_the_search_ends_just_below_the_capacity(capacity: float) -> None:
    search = Search(40.0)
    for _ in range(40):
        if search.done:
            break
        search.note(search.rate <= capacity)
    assert search.done and search.best is not None
    assert capacity / 1.08 <= search.best <= capacity


def test_the_search_gives_up_where_nothing_passes() -> None:
    search = Search(40.0)
    while not search.done:
        search.note(False)
    assert search.best is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_arrivals_have_the_rate_asked_for_and_zipfs_shares(pattern: Pattern) -> None:
    arrivals = draw(pattern, 100.0, 200.0, 8, 2, seed=1)
    assert len(arrivals) == pytest.approx(100 * 200, rel=0.05)
    counts = np.bincount([int(arrival.adapter[-3:]) for arrival in arrivals], minlength=8)
    assert counts / len(arrivals) == pytest.approx(1 / np.arange(1, 9) / sum(1 / np.arange(1, 9)), abs=0.02)
    times = np.array([arrival.at for arrival in arrivals])
    assert (np.diff(times) >= 0).all() and {len(arrival.texts) for arrival in arrivals} == {2}
    in_burst = np.mean(times % 2.0 < 0.5)
    assert in_burst == pytest.approx({"poisson": 0.25, "bursts": 0.625}[pattern], abs=0.02)


def test_what_was_not_answered_is_slower_than_everything() -> None:
    outcome = Outcome(10.0, [0.1] * 99 + [0.3], 0, 0.0)
    assert (outcome.quantile(0.5), outcome.quantile(0.99), outcome.goodput(0.2)) == (0.1, 0.3, 9.9)
    assert Outcome(10.0, [0.1] * 98, 2, 0.0).quantile(0.99) == float("inf")


def test_an_open_loop_does_not_wait_for_answers_and_gives_up_the_hopeless() -> None:
    asked = []

    async def never(arrival: Arrival) -> None:
        asked.append(arrival)
        if arrival.at >= 0.01:
            raise TimeoutError
        await asyncio.sleep(0)

    arrivals = [Arrival(at, "a", (0,)) for at in (0.0, 0.005, 0.01, 0.02)]
    outcome = asyncio.run(offer(never, arrivals, 1.0, 0.1))
    assert asked == arrivals and (len(outcome.latencies), outcome.unanswered) == (2, 2)
