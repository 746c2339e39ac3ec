"""Where an adapter's rows go."""

from __future__ import annotations

from collections import Counter

import pytest

from adapter_router.config import RoutingConfig
from adapter_router.routing.affinity import choose
from adapter_router.routing.fleet import ReplicaState

CONFIG = RoutingConfig(max_batch_rows=32)


def fleet(count: int) -> list[ReplicaState]:
    return [ReplicaState(f"r{i}") for i in range(count)]


def test_resident_first() -> None:
    states = fleet(8)
    for holder in states:
        holder.resident = {"a"}
        assert choose("a", 1, states, CONFIG) is holder
        holder.resident = set()


def test_an_idle_fleet_spreads_adapters_evenly_and_agrees_with_itself() -> None:
    states = fleet(4)
    homes = Counter(choose(f"adapter-{i}", 1, states, CONFIG).replica for i in range(2000))
    assert all(count == pytest.approx(500, rel=0.15) for count in homes.values())
    again = Counter(choose(f"adapter-{i}", 1, list(reversed(states)), CONFIG).replica for i in range(2000))
    assert again == homes


def test_a_new_replica_moves_only_its_share() -> None:
    before = {f"a{i}": choose(f"a{i}", 1, fleet(4), CONFIG).replica for i in range(2000)}
    after = {f"a{i}": choose(f"a{i}", 1, fleet(5), CONFIG).replica for i in range(2000)}
    moved = [name for name in before if before[name] != after[name]]
    assert all(after[name] == "r4" for name in moved)
    assert len(moved) == pytest.approx(400, rel=0.2)


def test_a_busy_holder_keeps_its_rows_until_a_copy_pays_for_itself() -> None:
    states = fleet(2)
    holder, other = states
    holder.resident = {"a"}
    holder.row_s, other.load_s = 0.001, 0.1
    holder.rows = 10  # 10 ms of backlog against 4 x 100 ms for a copy and a batch of 32 x 5 ms
    assert choose("a", 1, states, CONFIG) is holder
    holder.row_s = 0.05  # 500 ms
    assert choose("a", 1, states, CONFIG) is holder
    holder.row_s = 0.06  # 600 ms
    assert choose("a", 1, states, CONFIG) is other


def test_a_part_of_a_batch_is_no_reason_for_a_copy_however_cheap() -> None:
    states = fleet(2)
    holder, other = states
    holder.resident, other.load_s = {"a"}, 1e-4
    holder.rows = CONFIG.max_batch_rows
    assert choose("a", 1, states, CONFIG) is holder
    holder.rows += 1
    assert choose("a", 1, states, CONFIG) is other


def test_what_is_hot_is_copied_for_less() -> None:
    states = fleet(2)
    holder, other = states
    holder.resident, other.load_s = {"a"}, 1e-4
    holder.rows = CONFIG.max_batch_rows // 4
    assert choose("a", 1, states, CONFIG, rate=1.0) is holder
    assert choose("a", 1, states, CONFIG, rate=7.0) is other


def test_the_load_bound_holds_however_cheap_the_holder_looks() -> None:
    states = fleet(4)
    states[0].resident = {"hot"}
    for state in states:
        state.row_s = 0.0
    for _ in range(2000):
        chosen = choose("hot", 1, states, CONFIG)
        mean = (sum(state.rows for state in states) + 1) / len(states)
        chosen.rows += 1
        assert chosen.rows <= (1 + CONFIG.load_slack) * mean + CONFIG.max_batch_rows
    assert min(state.rows for state in states[1:]) >= 0 and sum(state.rows > 0 for state in states) > 1


def test_the_bare_base_is_resident_everywhere() -> None:
    states = fleet(3)
    states[0].rows = states[1].rows = 5
    assert choose(None, 1, states, CONFIG) is states[2]


def test_rows_follow_a_load_in_flight() -> None:
    states = fleet(4)
    first = choose("a", 1, states, CONFIG)
    first.sent(20, "a")  # 100 ms of backlog, where a load takes 50
    assert choose("a", 1, states, CONFIG) is first
    first.returned(20, "a")
    assert "a" not in first.loading


def test_a_copy_that_is_there_is_better_than_one_that_is_coming() -> None:
    states = fleet(2)
    holder, other = states
    holder.resident = {"a"}
    other.sent(1, "a")
    holder.rows = 8  # 40 ms of backlog
    assert choose("a", 1, states, CONFIG) is holder
    holder.rows = 12  # 60 ms, the load takes 50 at most
    assert choose("a", 1, states, CONFIG) is other


def test_a_new_copy_goes_where_fewest_are_loaded() -> None:
    states = fleet(2)
    for state in states:
        state.row_s = 0.0  # rows cost nothing, but loads wait for each other
    for index in range(6):
        choose(f"other-{index}", 1, states, CONFIG).sent(1, f"other-{index}")
    assert [len(state.loading) for state in states] == [3, 3]


def test_two_calls_may_wait_for_one_load() -> None:
    (state,) = fleet(1)
    state.sent(1, "a")
    state.sent(1, "a")
    state.returned(1, "a")
    assert "a" in state.loading and state.rows == 1 and state.warm_calls == 0
