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
        holder.resident = frozenset({"a"})
        assert choose("a", 1, states, CONFIG) is holder
        holder.resident = frozenset()


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
    holder.resident = frozenset({"a"})
    holder.row_s, other.load_s = 0.001, 0.1
    holder.rows = 10  # 10 ms of backlog against 4 x 100 ms for a copy
    assert choose("a", 1, states, CONFIG) is holder
    holder.row_s = 0.05  # 500 ms of backlog
    assert choose("a", 1, states, CONFIG) is other


def test_the_load_bound_holds_however_cheap_the_holder_looks() -> None:
    states = fleet(4)
    states[0].resident = frozenset({"hot"})
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
