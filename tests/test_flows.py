"""How long the rows of one tenant and adapter will wait, by how often it has been their turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_router.routing.flows import Flows


def served(flows: Flows, key: str, rate: int, seconds: float, start: float = 0.0) -> float:
    """``rate`` rows of 10 tokens a second; returns the time at the end."""
    for number in range(1, round(rate * seconds) + 1):
        flows.left(key, 10, start + number / rate, served=True)
    return start + seconds


def test_what_waits_over_how_fast_it_is_served() -> None:
    flows = Flows()
    for key, tokens, rate in (("hot", 10_000, 20), ("other", 10_000, 100)):
        flows.entered(key, tokens)
        now = served(flows, key, rate, 3.0)
    assert flows.wait_s("hot", 0, now) == pytest.approx((10_000 - 600) / 200, rel=0.05)
    assert flows.wait_s("other", 0, now) == pytest.approx((10_000 - 3000) / 1000, rel=0.05)
    assert flows.wait_s("hot", 200, now) - flows.wait_s("hot", 0, now) == pytest.approx(1.0, rel=0.05)


def test_nothing_is_said_of_what_has_hardly_waited() -> None:
    flows = Flows()
    assert flows.wait_s("new", 10, 0.0) == 0.0
    flows.entered("new", 1000)
    assert flows.wait_s("new", 10, 5.0) == 0.0, "it waits for a load, say"
    flows.left("new", 10, 5.0, served=False)
    assert flows.wait_s("new", 10, 5.0) == 0.0, "rows that gave up are no turns"
    flows.entered("soon", 1000)
    served(flows, "soon", 100, 0.4, start=5.0)
    assert flows.wait_s("soon", 10, 5.4) == 0.0 < flows.wait_s("soon", 10, 5.6)


def test_an_outage_is_no_sign_of_slow_turns() -> None:
    """After ten seconds without a replica the first answers do not mean that the rest takes minutes."""
    flows = Flows()
    flows.entered("a", 100_000)
    now = served(flows, "a", 100, 5.0)
    assert flows.wait_s("a", 0, now) == pytest.approx(95, rel=0.05)
    assert flows.wait_s("a", 0, now + 10) == 0.0
    flows.left("a", 10, now + 10, served=True)
    assert flows.wait_s("a", 0, now + 10.4) == 0.0
    served(flows, "a", 100, 5.0, start=now + 10)
    assert flows.wait_s("a", 0, now + 15) == pytest.approx(90, rel=0.05)


def test_a_pause_begins_anew() -> None:
    flows = Flows()
    flows.entered("a", 100)
    served(flows, "a", 5, 2.0)
    assert len(flows) == 0
    flows.entered("a", 100)
    assert flows.wait_s("a", 10, 11.0) == 0.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=60))
def test_memory_is_what_waits(rows: list[tuple[str, int]]) -> None:
    flows = Flows()
    for key, tokens in rows:
        flows.entered(key, tokens)
    assert len(flows) == len({key for key, _ in rows})
    for key, tokens in rows:
        flows.left(key, tokens, 1.0, served=True)
    assert len(flows) == 0
