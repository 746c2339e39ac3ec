"""Rates that fade."""

from __future__ import annotations

import pytest

from adapter_router.routing.demand import Demand


def test_what_comes_evenly_has_its_rate() -> None:
    demand = Demand(half_life_s=10)
    for tick in range(1000):
        demand.note("a", 0.5, tick / 10)
    assert demand.rate("a", 99.9) == pytest.approx(5.0, rel=0.02)
    assert demand.rate("a", 109.9) == pytest.approx(2.5, rel=0.02)
    assert demand.rate("b", 99.9) == 0.0


def test_the_hottest_come_first_and_cool_down() -> None:
    demand = Demand(half_life_s=1)
    for key, amount in (("warm", 5.0), ("hot", 9.0), ("cool", 1.0)):
        demand.note(key, amount, 0.0)
    assert demand.hottest(2, 0.0) == ["hot", "warm"]
    demand.note("cool", 4.0, 5.0)
    assert demand.hottest(1, 5.0) == ["cool"]


def test_memory_does_not_grow() -> None:
    demand = Demand(capacity=10)
    for number in range(1000):
        demand.note(str(number), 1.0, 0.0)
    assert len(demand) == 10 and demand.rate("999", 0.0) > 0 == demand.rate("0", 0.0)
