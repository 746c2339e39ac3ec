"""Which adapters a memory would have to hold: those that are asked for again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapter_router.routing.working_set import WorkingSet


def test_a_scan_is_no_working_set() -> None:
    asked = WorkingSet(15)
    for number in range(1000):
        asked.note(f"a{number}", 10, now=number * 0.01)
    assert asked.num_bytes(10.0) == asked.num_adapters(10.0) == 0


def test_what_is_asked_for_again_counts_until_nobody_does() -> None:
    asked = WorkingSet(15)
    for now in (0.0, 5.0):
        asked.note("a", 10, now)
        asked.note("b", 7, now)
    assert (asked.num_adapters(5.0), asked.num_bytes(5.0)) == (2, 17)
    asked.note("a", 10, 16.0)
    asked.note("a", 10, 17.0)
    assert asked.num_bytes(29.0) == 17, "b was asked for less than 30 s ago"
    assert asked.num_bytes(31.0) == 10
    assert asked.num_bytes(100.0) == 0


@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0, 7)), max_size=80))
def test_the_running_total_is_the_sum(steps: list[tuple[int, float]]) -> None:
    asked, now = WorkingSet(10), 0.0
    for number, pause in steps:
        now += pause
        asked.note(str(number), number, now)
        held = asked._again.keys() | asked._again_before.keys()
        assert asked.num_bytes(now) == sum(map(int, held)) and asked.num_adapters(now) == len(held)
