"""Virtual token counters: who waits gets their share, whatever the others ask for."""

from __future__ import annotations

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
        if shares.first() == "greedy":
            shares.charge("greedy", 100)
        shares.leave("greedy")
    assert shares.first() == "patient"
    shares.charge("patient", 99)
    assert shares.first() == "patient"


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
    assert len(shares) == 1 and len(shares._done) < 3000 and len(shares._order) < 3000
