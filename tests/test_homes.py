"""Rendezvous homes: the same for everybody, in proportion to weights, and as few moves as can be."""

from __future__ import annotations

from collections import Counter

import pytest

from adapter_router.routing.homes import Homes

ADAPTERS = [f"sha256:{number:064x}" for number in range(4000)]


def homes(weights: dict[str, float]) -> Homes:
    found = Homes()
    found.sync(weights)
    return found


def even(count: int) -> dict[str, float]:
    return {f"replica-{number}": 1.0 for number in range(count)}


def test_the_order_in_which_replicas_are_named_does_not_matter() -> None:
    one, other = homes(even(20)), homes(dict(reversed(even(20).items())))
    assert all(one.of(adapter, 5) == other.of(adapter, 5) for adapter in ADAPTERS[:500])


def test_weights_are_shares() -> None:
    found = homes({"small": 1.0, "large": 3.0})
    shares = Counter(found.of(adapter, 1)[0] for adapter in ADAPTERS)
    assert shares["large"] == pytest.approx(3000, rel=0.05)


def test_a_replica_that_goes_moves_its_own_adapters_alone_each_to_its_second_home() -> None:
    found = homes(even(50))
    before = {adapter: found.of(adapter, 3) for adapter in ADAPTERS}
    found.sync({name: weight for name, weight in even(50).items() if name != "replica-7"})
    moved = 0
    for adapter, ranked in before.items():
        left = tuple(name for name in ranked if name != "replica-7")
        assert found.of(adapter, 3)[: len(left)] == left
        moved += ranked[0] == "replica-7"
    assert moved == pytest.approx(len(ADAPTERS) / 50, rel=0.35)


def test_a_replica_that_grows_only_gains() -> None:
    found = homes(even(10))
    before = {adapter: found.of(adapter, 1) for adapter in ADAPTERS}
    found.sync({**even(10), "replica-3": 2.0})
    changed = {found.of(adapter, 1) for adapter, ranked in before.items() if found.of(adapter, 1) != ranked}
    assert changed == {("replica-3",)}


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40, 100])
def test_as_many_as_there_are_each_once(count: int) -> None:
    found = homes(even(40)).of("a", count)
    assert len(found) == len(set(found)) == min(count, 40)


def test_more_homes_begin_with_the_fewer() -> None:
    found = homes(even(40))
    assert found.of("a", 40)[:16] == found.of("a", 16) == homes(even(40)).of("a", 16)


def test_nobody_is_at_home_nowhere() -> None:
    assert homes({}).of("a", 3) == ()
