"""What the router believes a replica holds: the replies' news, in whatever order they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapter_router.errors import InternalError
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.types import ReplicaLoad, ResidencyChange, ShardReply


def one_replica() -> tuple[Fleet, ReplicaState]:
    fleet = Fleet()
    ((state,), _) = fleet.sync([Member("r0", "rank-0")])
    return fleet, state


def reply(  # noqa: PLR0913  what a reply says, each by its name
    replica: str,
    revision: int,
    added: str = "",
    *,
    removed: str = "",
    complete: bool = False,
    rows: int = 0,
    answered: int = 0,
) -> ShardReply:
    change = ResidencyChange(revision, frozenset(added), frozenset(removed), complete)
    return ShardReply(replica, [InternalError("")] * answered, change, ReplicaLoad(rows))


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
    member = Member("r0", "rank-0")
    ((old,), gone) = fleet.sync([member])
    fleet.observe(reply("r0", 7, "a", complete=True), None)
    fleet.assigned(old, 3)
    fleet.sent(old, 3, "b")
    assert [*fleet.copies("a")] == [*fleet.copies("b")] == [old] and gone == []
    assert fleet.sync([]) == ([], [old])
    assert fleet.total_rows == len(fleet.copies("a")) == len(fleet.copies("b")) == len(fleet.states()) == 0
    ((state,), _) = fleet.sync([member])
    assert (state.revision, state.resident, state.rows) == (0, set(), 0)
    fleet.returned(old, 3, "b")  # the lost call of its earlier life
    fleet.sent(old, 0, "c")
    assert fleet.total_rows == 0 and not fleet.copies("c")


def test_those_that_stay_keep_what_is_known_of_them() -> None:
    fleet = Fleet()
    fleet.sync([Member("r0", "rank-0"), Member("r1", "rank-1")])
    state = fleet.get("r1")
    assert state
    fleet.loaded("r1", "a")
    fleet.assigned(state, 5)
    came, gone = fleet.sync([Member("r1", "rank-1", 2.0), Member("r2", "rank-2")])
    assert [one.replica for one in came] == ["r2"] and [one.replica for one in gone] == ["r0"]
    assert fleet.get("r1") is state and [*fleet.copies("a")] == [state]
    assert (fleet.total_rows, state.weight) == (5, 2.0)


def test_the_index_forgets_what_is_neither_held_nor_loading() -> None:
    fleet, state = one_replica()
    fleet.sent(state, 0, "a")
    fleet.sent(state, 0, "a")
    fleet.returned(state, 0, "a")
    assert [*fleet.copies("a")] == [state] and state.loading["a"] == 1 and state.warm_calls == 0
    fleet.observe(reply("r0", 1, "a"), None)
    fleet.returned(state, 0, "a")
    assert [*fleet.copies("a")] == [state] and "a" not in state.loading
    fleet.sent(state, 0, "a")  # somebody thought it was gone
    fleet.observe(reply("r0", 2, removed="a"), None)
    assert [*fleet.copies("a")] == [state] and not state.holds("a")
    fleet.returned(state, 0, "a")
    assert not fleet.copies("a")
    fleet.observe(reply("r0", 3, "ab"), None)
    fleet.observe(reply("r0", 5, "b", complete=True), None)
    fleet.observe(reply("r0", 4, "a"), None)  # older than what is known
    assert not fleet.copies("a") and [*fleet.copies("b")] == [state]


def test_rows_of_other_routers_are_those_that_are_not_ours() -> None:
    fleet, state = one_replica()
    fleet.assigned(state, 10)
    fleet.sent(state, 4, None)
    fleet.sent(state, 3, None)
    fleet.observe(reply("r0", 1, rows=12, answered=4), 0.1)  # 3 of the 12 are ours
    fleet.returned(state, 4, None)
    assert (state.queued, state.in_flight, state.others, state.rows, fleet.total_rows) == (3, 3, 9, 15, 15)
    assert state.warm_calls == 1
    fleet.observe(reply("r0", 1, rows=0, answered=3), 0.1)  # the others have been answered
    fleet.returned(state, 3, None)
    assert (state.others, fleet.total_rows) == (0, 3)


def test_what_others_asked_for_fades_where_nothing_is_heard() -> None:
    fleet, state = one_replica()
    fleet.observe(reply("r0", 1, rows=64), None)
    fleet.fade(1.0)
    assert (state.others, fleet.total_rows) == (32, 32)
    fleet.fade(10.0)
    assert (state.others, fleet.total_rows) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from("ab"), st.integers(1, 4)), max_size=60))
def test_totals_and_indexes_are_what_a_look_at_everybody_finds(steps: list[tuple[int, int, str, int]]) -> None:
    fleet = Fleet()
    calls: list[tuple[ReplicaState, int, str | None]] = []
    for action, number, digest, amount in steps:
        state = fleet.get(f"r{number}")
        if action == 0 or state is None:
            fleet.sync(Member(f"r{n}", f"rank-{n}", 1.0 + n) for n in range(4) if n != number or state is None)
        elif action == 1:
            cold = None if state.holds(digest) else digest
            fleet.assigned(state, amount)
            fleet.sent(state, amount, cold)
            calls.append((state, amount, cold))
        elif action == 2 and calls:
            fleet.returned(*calls.pop(0))
        elif action == 3:
            fleet.observe(reply(state.replica, state.revision + 1, digest, rows=9, complete=amount == 1), 0.1)
        elif action == 4:
            fleet.set_suspect(state, amount > 2)
        else:
            fleet.admit(state)
        living = fleet.states()
        for one in "ab":
            assert {*fleet.copies(one)} == {state for state in living if one in state.resident or one in state.loading}
        assert fleet.total_rows == sum(state.rows for state in living)
        good = [state for state in living if state.admitted and not state.suspect] or [*living]
        assert {state for state in living if state.choosable} == {*good}
        if good:
            assert fleet.mean_rows(1) == (sum(one.rows for one in good) + 1) / sum(one.weight for one in good)
            fullness = [one.rows / one.weight for one in fleet.least_loaded(2)]
            assert fullness == sorted(one.rows / one.weight for one in good)[:2]


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
