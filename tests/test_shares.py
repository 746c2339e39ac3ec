"""Virtual token counters: who waits gets their share, whatever the others ask for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_router.routing.shares import Shares

COSTS = st.integers(1, 50)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), COSTS), min_size=1, max_size=200), st.data())
def test_between_two_that_wait_all_the_time_the_difference_is_bounded(
    others: list[tuple[str, int]], data: st.DataObject
) -> None:
    """x and y always wait; the others come and go."""
    shares: Shares[str] = Shares(lambda key: 2.0 if key == "y" else 1.0)
    shares.enter("x")
    shares.enter("y")
    done = {"x": 0.0, "y": 0.0}
    for key, cost in others:
        shares.enter(key)
        turn = shares.first()
        assert turn is not None
        if turn in done:
            drawn = data.draw(COSTS)
            done[turn] += drawn / (2 if turn == "y" else 1)
            shares.charge(turn, drawn)
        else:
            shares.charge(turn, cost)
            shares.leave(turn)
        assert abs(done["x"] - done["y"]) <= 2 * 50


def test_who_comes_back_is_owed_nothing_for_the_pause() -> None:
    shares: Shares[str] = Shares()
    shares.enter("idle")
    shares.charge("idle", 1)
    shares.leave("idle")
    shares.enter("busy")
    for _ in range(100):
        assert shares.first() == "busy"
        shares.charge("busy", 10)
    shares.enter("idle")
    turns = []
    for _ in range(10):
        turn = shares.first()
        assert turn is not None
        turns.append(turn)
        shares.charge(turn, 10)
    assert turns.count("idle") == 5


def test_who_leaves_and_comes_back_does_not_shake_off_what_it_got() -> None:
    shares: Shares[str] = Shares()
    shares.enter("patient")
    for _ in range(20):
        shares.enter("greedy")
        shares.charge("greedy", 100)
        shares.leave("greedy")
    shares.enter("greedy")
    shares.charge("patient", 1999)
    assert shares.first() == "patient"
    shares.charge("patient", 2)
    assert shares.first() == "greedy"


def test_equals_take_turns() -> None:
    shares: Shares[int] = Shares()
    for key in range(4):
        shares.enter(key)
    turns = []
    for _ in range(12):
        turn = shares.first()
        assert turn is not None
        turns.append(turn)
        shares.charge(turn, 1)
    assert turns == [0, 1, 2, 3] * 3


def test_those_who_went_are_forgotten() -> None:
    shares: Shares[int] = Shares()
    shares.enter(-1)
    for key in range(20_000):
        shares.enter(key)
        shares.leave(key)
        shares.charge(-1, 1)
    assert len(shares) == 1 and len(shares._done) < 200 and len(shares._order) < 200 and len(shares._listed) < 200


@pytest.mark.parametrize("cost", [0, 10])
def test_those_who_went_are_forgotten_though_nobody_is_served(cost: int) -> None:
    """The one that waits stays where it was: what was charged meanwhile must be remembered, and nothing else."""
    shares: Shares[int] = Shares()
    shares.enter(-1)
    for key in range(100_000):
        shares.enter(key)
        if cost and key % 100 == 0:
            shares.charge(key, cost)
        shares.leave(key)
    ahead = 1000 if cost else 0
    assert len(shares._done) <= 2 * ahead + 100 and len(shares._order) < 200 and len(shares._listed) < 200


def test_what_was_charged_is_forgotten_once_the_others_have_caught_up() -> None:
    shares: Shares[int] = Shares()
    shares.enter(-1)
    for key in range(100_000):
        shares.enter(key)
        shares.charge(key, 10)
        shares.leave(key)
        shares.charge(-1, 10)
    assert len(shares._done) < 300


def test_what_is_charged_to_those_who_never_wait_is_forgotten_as_well() -> None:
    shares: Shares[int] = Shares()
    for key in range(20_000):
        shares.enter(-1)
        shares.charge(key, 1)
        shares.leave(-1)
        shares.charge(-1, 5)
    assert len(shares._done) < 300


def test_to_forget_costs_little() -> None:
    """Thousands ahead of one that waits; each that leaves must not look through all of them."""
    looked = []

    class Counted(dict[int, float]):
        def items(self) -> Any:
            looked.append(len(self))
            return super().items()

    shares: Shares[int] = Shares()
    shares.enter(-1)
    for key in range(5000):
        shares.enter(key)
        shares.charge(key, 10)
    for key in range(5000):
        if not isinstance(shares._done, Counted):
            shares._done = Counted(shares._done)
        shares.leave(key)
    assert sum(looked) < 3 * 5000


def test_who_is_passed_over_keeps_its_place() -> None:
    shares: Shares[str] = Shares()
    for key in "abc":
        shares.enter(key)
    shares.pass_over()
    assert shares.first() == "b"
    shares.charge("b", 5)
    assert shares.first() == "c"
    shares.pass_over()
    shares.pass_over()
    assert shares.first() is None
    shares.pass_over()
    shares.resume()
    turns = []
    for _ in range(3):
        turn = shares.first()
        assert turn is not None
        turns.append(turn)
        shares.charge(turn, 10)
    assert turns == ["a", "c", "b"]
    shares.leave("a")
    shares.enter("a")
    assert shares.first() == "c", "to leave and come back shakes nothing off"


def test_who_was_passed_over_is_before_its_equals_again() -> None:
    shares: Shares[str] = Shares()
    for key in "ab":
        shares.enter(key)
    shares.pass_over()
    assert shares.first() == "b"
    shares.resume()
    assert shares.first() == "a"


def test_who_comes_while_others_were_passed_over_is_level_with_the_lowest() -> None:
    shares: Shares[str] = Shares()
    for key in "ab":
        shares.enter(key)
    shares.pass_over()
    shares.charge("b", 100)
    assert shares.first() == "b"
    shares.resume()
    shares.enter("new")
    assert shares.first() == "a"
    shares.charge("a", 10)
    assert shares.first() == "new", "it began at 0, not at 100"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "serve", "pass"]), st.integers(0, 5), COSTS), max_size=150)
)
def test_it_does_what_plain_counters_do(steps: list[tuple[str, int, int]]) -> None:
    """The model looks at everybody each time. Ties are broken by age, which only the real one knows."""
    shares: Shares[int] = Shares(lambda key: key + 1.0)
    done: dict[int, float] = {}
    waiting: dict[int, int] = {}
    floor = 0.0
    for kind, key, cost in steps:
        if kind == "enter":
            if not waiting.get(key):
                floor = min((done[other] for other, count in waiting.items() if count), default=floor)
                done[key] = max(done.get(key, 0.0), floor)
            waiting[key] = waiting.get(key, 0) + 1
            shares.enter(key)
        elif kind == "leave" and waiting.get(key):
            waiting[key] -= 1
            if not any(waiting.values()):
                floor = done[key]
            shares.leave(key)
        elif kind == "serve" and (first := shares.first()) is not None:
            shares.charge(first, cost)
            done[first] += cost / (first + 1.0)
        elif kind == "pass":
            shares.pass_over()
            shares.first()
            shares.resume()
        present = {other for other, count in waiting.items() if count}
        assert len(shares) == len(present) and all(map(shares.waits, present))
        first = shares.first()
        assert (first is None) == (not present)
        assert first is None or done[first] == min(done[other] for other in present)
