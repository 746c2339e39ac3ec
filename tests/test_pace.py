"""How fast a replica is, as far as its calls tell."""

from __future__ import annotations

import pytest

from adapter_router.routing.pace import Pace


def test_all_seconds_over_all_tokens() -> None:
    pace = Pace()
    assert pace.token_s is None
    pace.add(10, 0.02)
    assert pace.token_s == pytest.approx(0.002)
    for _ in range(20):
        pace.add(320, 0.1)
    assert pace.token_s == pytest.approx(0.1 / 320, rel=0.05), "a row alone says little of what full batches take"


def test_what_has_changed_is_known_after_a_few_seconds_of_work() -> None:
    pace = Pace()
    for _ in range(100):
        pace.add(320, 0.1)
    for _ in range(20):
        pace.add(320, 0.5)
    assert pace.token_s == pytest.approx(0.5 / 320, rel=0.2)
