"""What the router believes a replica holds: the replies' news, in whatever order they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapter_router.routing.fleet import Fleet, ReplicaState
from adapter_router.types import ResidencyChange


def test_news_is_added_up() -> None:
    state = ReplicaState("r0")
    state.learn(ResidencyChange(1, frozenset("ab"), complete=True))
    state.learn(ResidencyChange(2, frozenset("c"), frozenset("a")))
    assert state.resident == {"b", "c"} and state.revision == 2


def test_old_news_is_no_news() -> None:
    state = ReplicaState("r0")
    state.learn(ResidencyChange(5, frozenset("a"), complete=True))
    state.learn(ResidencyChange(4, frozenset("b"), frozenset("a")))
    assert state.resident == {"a"} and state.revision == 5


def test_a_replica_that_comes_back_is_another_one() -> None:
    fleet = Fleet()
    fleet.sync(["r0"])
    fleet.observe("r0", ResidencyChange(7, frozenset("a"), complete=True), None, 0.1)
    fleet.sync([])
    fleet.sync(["r0"])
    (state,) = fleet.states()
    assert (state.revision, state.resident) == (0, set())


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30), st.data())
def test_replies_that_overtake_each_other_leave_the_truth(steps: list[tuple[str, bool]], data: st.DataObject) -> None:
    """Replies made at any time for any earlier revision, delivered in any order, the newest among them."""
    states = [frozenset[str]()]
    for digest, held in steps:
        states.append(states[-1] | {digest} if held else states[-1] - {digest})
    last = len(states) - 1

    def change(since: int, until: int) -> ResidencyChange:
        touched = {digest for digest, _ in steps[since:until]}
        return ResidencyChange(until, states[until] & touched, frozenset(touched) - states[until])

    known = ReplicaState("r0")
    while known.revision < last:
        replies = []
        for _ in range(data.draw(st.integers(1, 4))):
            since = data.draw(st.integers(0, known.revision))
            replies.append(change(since, data.draw(st.integers(since, last))))
        for reply in data.draw(st.permutations([*replies, change(known.revision, last)])):
            known.learn(reply)
    assert known.resident == states[last]
