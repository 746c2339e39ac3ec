"""Where an adapter's rows go."""

from __future__ import annotations

from collections import Counter

import pytest

from adapter_router.config import RoutingConfig
from adapter_router.routing.affinity import Wanted, choose
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.types import ReplicaLoad, ResidencyChange, ShardReply

CONFIG = RoutingConfig(max_batch_rows=32)


def fleet(count: int, weights: dict[int, float] | None = None) -> Fleet:
    found = Fleet()
    names = reversed(range(count))  # the order in which they are named says nothing
    came, _ = found.sync(Member(f"replica-{n}", f"rank-{n}", (weights or {}).get(n, 1.0)) for n in names)
    for state in came:
        found.admit(state)
    return found


def chosen(wanted: Wanted | str, among: Fleet, *avoid: str) -> ReplicaState:
    wanted = Wanted(wanted, 1) if isinstance(wanted, str) else wanted
    state = choose(wanted, among, CONFIG, avoid)
    assert state is not None
    return state


def test_resident_first() -> None:
    for number in range(8):
        states = fleet(8)
        states.loaded(f"replica-{number}", "a")
        assert chosen("a", states).replica == f"replica-{number}"


def test_an_idle_fleet_spreads_adapters_evenly_and_routers_agree() -> None:
    one, other = fleet(4), Fleet()
    other.sync(Member(f"another life {n}", f"rank-{n}") for n in (2, 0, 3, 1))
    homes = Counter(chosen(f"adapter-{i}", one).home for i in range(2000))
    assert all(count == pytest.approx(500, rel=0.15) for count in homes.values())
    assert all(chosen(f"adapter-{i}", one).home == chosen(f"adapter-{i}", other).home for i in range(2000))


def test_a_new_replica_moves_only_its_share() -> None:
    four, five = fleet(4), fleet(5)
    before = {f"a{i}": chosen(f"a{i}", four).replica for i in range(2000)}
    after = {f"a{i}": chosen(f"a{i}", five).replica for i in range(2000)}
    moved = [name for name in before if before[name] != after[name]]
    assert all(after[name] == "replica-4" for name in moved)
    assert len(moved) == pytest.approx(400, rel=0.2)


def test_a_busy_holder_keeps_its_rows_until_a_copy_pays_for_itself() -> None:
    states = fleet(2)
    states.loaded("replica-0", "a")
    holder, other = states.get("replica-0"), states.get("replica-1")
    assert holder and other
    holder.row_s, other.load_s = 0.001, 0.1
    states.assigned(holder, 10)  # 10 ms of backlog against 4 x 100 ms for a copy and a batch of 32 x 5 ms
    assert chosen("a", states) is holder
    holder.row_s = 0.05  # 500 ms
    assert chosen("a", states) is holder
    holder.row_s = 0.06  # 600 ms
    assert chosen("a", states) is other


def test_a_part_of_a_batch_is_no_reason_for_a_copy_however_cheap() -> None:
    states = fleet(2)
    states.loaded("replica-0", "a")
    holder, other = states.get("replica-0"), states.get("replica-1")
    assert holder and other
    other.load_s = 1e-4
    states.assigned(holder, CONFIG.max_batch_rows)
    assert chosen("a", states) is holder
    states.assigned(holder, 1)
    assert chosen("a", states) is other


def test_what_is_hot_is_copied_for_less() -> None:
    states = fleet(2)
    states.loaded("replica-0", "a")
    holder, other = states.get("replica-0"), states.get("replica-1")
    assert holder and other
    other.load_s = 1e-4
    states.assigned(holder, CONFIG.max_batch_rows // 4)
    assert chosen(Wanted("a", 1, rate=1.0), states) is holder
    assert chosen(Wanted("a", 1, rate=7.0), states) is other


def after_rows(states: Fleet, rows: dict[ReplicaState, int]) -> None:
    """So many have been asked of each, one after the other, and are answered."""
    for _ in range(50):
        for state, count in rows.items():
            states.assigned(state, count)
            states.assigned(state, -count)


def test_what_keeps_a_busy_replica_busy_has_a_right_to_a_second_home() -> None:
    states = fleet(4)
    first, second = states.homes("a", 2)
    states.loaded(first.replica, "a")
    states.assigned(first, 11)  # 55 ms, where a load takes 50 and the penalty is 4
    after_rows(states, dict.fromkeys(states.states(), 10))
    assert chosen(Wanted("a", 1, rate=21), states) is first  # its replica has no more to do than the others
    after_rows(states, {state: 14 if state is first else 10 for state in states.states()})
    assert chosen(Wanted("a", 1, rate=19), states) is first  # rows a second at 5 ms: less than a tenth of its time
    assert chosen(Wanted("a", 1, rate=21), states) is second


def test_copies_follow_the_rate_and_stay_on_the_first_homes() -> None:
    states, dear = fleet(20), RoutingConfig(copy_penalty=1e6)
    for _ in range(1000):
        state = choose(Wanted("hot", 4, rate=65.0), states, dear)  # x 5 ms = 3.25 tenths of a replica's time
        assert state
        if not state.holds("hot"):
            states.loaded(state.replica, "hot")
        states.assigned(state, 4)
        if states.total_rows > 40:
            states.assigned(max(states.states(), key=lambda one: one.rows), -4)
    assert {one.replica for one in states.copies("hot")} == {one.replica for one in states.homes("hot", 4)}


def test_the_rows_of_all_routers_count() -> None:
    states = fleet(4)
    first, second = states.homes("a", 2)
    states.loaded(first.replica, "a")
    states.assigned(first, 11)
    after_rows(states, {state: 14 if state is first else 10 for state in states.states()})
    assert chosen(Wanted("a", 1, rate=11), states) is first
    states.sent(first, 11, None)
    for _ in range(1000):  # as many rows as ours are always there, too
        states.observe(ShardReply(first.replica, [], ResidencyChange(1, frozenset("a")), ReplicaLoad(22)), 0.005)
        states.fade(100.0)
    assert states.routers == pytest.approx(2.0, rel=0.01)
    assert chosen(Wanted("a", 1, rate=11), states) is second


def test_of_equal_copies_the_one_gets_rows_that_got_fewer() -> None:
    states = fleet(2)
    first, second = states.homes("a", 2)
    for state in (first, second):
        states.loaded(state.replica, "a")
        states.assigned(state, 10)
    assert chosen(Wanted("a", 1, rate=50), states) is first
    after_rows(states, {first: 11, second: 10})
    assert chosen(Wanted("a", 1, rate=50), states) is second


def test_an_adapter_that_is_nowhere_leaves_its_home_only_for_much() -> None:
    states = fleet(8)
    first, second = states.homes("a", 2)
    for number in range(8):
        assert chosen("a", states) is first
        states.sent(first, 0, f"other-{number}")
    states.sent(first, 0, "one more")
    assert chosen("a", states) is second


def test_copies_left_over_fade() -> None:
    states = fleet(6)
    for state in states.states():
        states.loaded(state.replica, "was hot")
    first = states.homes("was hot", 1)[0]
    states.assigned(first, CONFIG.max_batch_rows - 1)  # others are idle
    assert chosen("was hot", states) is first
    states.assigned(first, 2)
    assert chosen("was hot", states) is not first


def test_a_large_adapter_needs_a_better_reason_for_a_copy() -> None:
    states = fleet(2)
    states.loaded("replica-0", "a")
    holder, other = states.get("replica-0"), states.get("replica-1")
    assert holder and other
    for _ in range(50):
        states.expect_load(1000)
    states.assigned(holder, 80)  # 400 ms against 4 x 50 ms and a batch of 160 ms
    assert chosen(Wanted("a", 1), states) is other
    assert chosen(Wanted("a", 1, num_bytes=2000), states) is holder
    assert chosen(Wanted("a", 1, num_bytes=500), states) is other


def test_the_load_bound_holds_however_cheap_the_holder_looks() -> None:
    states = fleet(4)
    states.loaded("replica-0", "hot")
    for state in states.states():
        state.row_s = 0.0
    for _ in range(2000):
        state = chosen("hot", states)
        states.assigned(state, 1)
        assert state.rows <= 1.25 * states.total_rows / 4 + CONFIG.max_batch_rows
    assert sum(state.rows > 0 for state in states.states()) > 1


def test_twice_the_weight_may_carry_twice_the_rows() -> None:
    states = fleet(3, {0: 2.0})
    large = states.get("replica-0")
    assert large
    hot = next(f"hot-{n}" for n in range(100) if states.homes(f"hot-{n}", 1) == [large])
    for state in states.states():
        state.row_s = 0.0
        states.loaded(state.replica, hot)
    for _ in range(4000):
        state = chosen(hot, states)
        states.assigned(state, 1)
        assert state.rows <= 1.25 * states.total_rows * state.weight / 4 + CONFIG.max_batch_rows
    assert large.rows > 2 * CONFIG.max_batch_rows + 4000 / 2


def test_with_all_at_their_bound_the_least_loaded_gets_them() -> None:
    states = fleet(40)
    homes = states.homes("a", 2)
    for state in states.states():
        states.assigned(state, 900 if state in homes else 100)
    rest = min((one for one in states.states() if one not in homes), key=lambda one: one.home)
    states.assigned(rest, -10)
    assert chosen("a", states) is rest


def test_the_bare_base_is_resident_everywhere() -> None:
    states = fleet(3)
    for number in (0, 1):
        state = states.get(f"replica-{number}")
        assert state
        states.assigned(state, 5)
    assert chosen(Wanted(None, 1), states).replica == "replica-2"


def test_rows_follow_a_load_in_flight() -> None:
    states = fleet(4)
    first = chosen("a", states)
    states.assigned(first, 20)  # 100 ms of backlog, where a load takes 50
    states.sent(first, 20, "a")
    assert chosen("a", states) is first
    states.returned(first, 20, "a")
    assert "a" not in first.loading


def test_a_copy_that_is_there_is_better_than_one_that_is_coming() -> None:
    states = fleet(2)
    holder, other = states.homes("a", 2)
    states.loaded(holder.replica, "a")
    states.sent(other, 0, "a")
    states.assigned(holder, 8)  # 40 ms of backlog
    assert chosen(Wanted("a", 1, rate=101), states) is holder
    states.assigned(holder, 4)  # 60 ms, the load takes 50 at most
    assert chosen(Wanted("a", 1, rate=101), states) is other


def test_who_is_avoided_gets_rows_only_where_nobody_else_lives() -> None:
    states = fleet(3)
    states.loaded("replica-0", "a")
    for wanted in (Wanted("a", 1), Wanted(None, 1)):
        assert chosen(wanted, states, "replica-0").replica in ("replica-1", "replica-2")
        assert chosen(wanted, states, "replica-0", "replica-2").replica == "replica-1"
        assert chosen(wanted, states, "replica-0", "replica-1", "replica-2") is not None
    state = states.get("replica-1")
    assert state
    states.set_suspect(state, True)
    assert chosen("a", states, "replica-0", "replica-2") is state


@pytest.mark.parametrize("digest", ["a", None])
def test_a_suspect_and_a_newcomer_get_no_rows_while_another_can(digest: str | None) -> None:
    states = fleet(3)
    states.sync([*(Member(f"replica-{n}", f"rank-{n}") for n in range(3)), Member("new", "rank-9")])
    suspect = states.get("replica-0")
    assert suspect
    states.set_suspect(suspect, True)
    states.loaded("replica-0", "a")
    states.loaded("new", "a")
    for _ in range(200):
        state = chosen(Wanted(digest, 1), states)
        states.assigned(state, 1)
        assert state.replica in ("replica-1", "replica-2")
    states.sync([Member("replica-0", "rank-0")])
    assert chosen(Wanted(digest, 1), states).replica == "replica-0"


def test_nobody_lives() -> None:
    assert choose(Wanted("a", 1), Fleet(), CONFIG) is None
    assert choose(Wanted(None, 1), Fleet(), CONFIG) is None


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_so_many_are_looked_at_however_many_there_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that everybody holds is the worst case."""
    states = fleet(count)
    for state in states.states():
        states.loaded(state.replica, "hot")
    chosen(Wanted("hot", 1, rate=1e6), states)
    looked = 0
    rows = ReplicaState.rows.fget
    assert rows

    def counted(state: ReplicaState) -> int:
        nonlocal looked
        looked += 1
        return int(rows(state))

    monkeypatch.setattr(ReplicaState, "rows", property(counted))
    chosen(Wanted("hot", 1, rate=1e6), states)
    assert 0 < looked <= 64


def test_a_hundred_copies_share_the_rows() -> None:
    states = fleet(100)
    for state in states.states():
        states.loaded(state.replica, "hot")
    for _ in range(3000):
        states.assigned(chosen(Wanted("hot", 1, rate=1e6), states), 1)
    assert {state.rows for state in states.states()} == {30}
