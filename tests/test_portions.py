"""Parts of the rows that fade."""

from __future__ import annotations

import pytest

from adapter_router.routing.portions import Portions


def test_parts_are_those_of_late() -> None:
    portions = Portions(horizon=100)
    for _ in range(1000):
        portions.add("a", 3, 2)
        portions.add("b", 1, 2)
    assert portions.of("a") == pytest.approx(0.75, abs=0.01)
    for _ in range(1000):
        portions.add("b", 1, 2)
    assert portions.of("b") > 0.99 and portions.of("a") + portions.of("b") == pytest.approx(1.0)


def test_numbers_stay_small_and_who_goes_is_forgotten() -> None:
    portions = Portions(horizon=10)
    for _ in range(100_000):
        portions.add("a", 1, 1)
        portions.add("b", 1, 1)
    assert portions.total == pytest.approx(10, rel=0.2) and portions.of("a") == pytest.approx(0.5, abs=0.06)
    portions.forget("a")
    assert portions.of("a") == 0.0 and portions.of("b") == pytest.approx(1.0)


def test_nobody_got_anything() -> None:
    assert Portions().of("a") == 0.0
