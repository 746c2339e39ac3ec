"""A router's memory of what names mean: bounded, never of the past, and fair in splitting."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import PHASES, Phase
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.splitting import choose
from adapter_router.errors import (
    AdapterFailed,
    AdapterNotFound,
    AdapterRejected,
    AdapterRouterError,
    AdapterUnavailable,
    InvalidRequest,
)
from adapter_router.types import AdapterVersion
from tests.catalogs import BASE, digest, spec, version


class Interrupted(Catalog):
    """A catalog in which something happens between a router's reading and its hearing what was read."""

    meanwhile: Callable[[], None] | None = None

    def routes_at(self, names: Any) -> Any:
        result = super().routes_at(names)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return result


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Interrupted]:
    """Holds ``food`` with versions 1 and 2, of which it means the second, and ``prod``, which means the first."""
    catalog = Interrupted(f"sqlite:///{tmp_path}/catalog.db")
    catalog.register(spec("food"))
    for number in (1, 2):
        catalog.add_version("food", version("food", number))
    catalog.set_alias("prod", {"food@v1": 1})
    yield catalog
    catalog.close()


@pytest.fixture
def routes(catalog: Catalog) -> Routes:
    return Routes(catalog)


def meant(found: object) -> str:
    assert isinstance(found, AdapterVersion), found
    return f"v{int(found.digest.removeprefix('sha256:'), 16)}"


# -- remembering -------------------------------------------------------------------------------------------------


def test_what_is_fetched_is_found(routes: Routes) -> None:
    names = {"food", "prod", "food@v1", f"food@{digest(2)}", "fod", "food@v9"}
    assert routes.missing(names) == names
    assert isinstance(routes.find("food"), AdapterUnavailable), "nobody has asked the catalog yet"
    routes.fetch(names)
    assert not routes.missing(names)
    found = {name: routes.find(name) for name in names}
    assert [meant(found[name]) for name in ("food", "prod", "food@v1", f"food@{digest(2)}")] == ["v2", "v1", "v1", "v2"]
    assert str(found["fod"]) == "no adapter is named 'fod'; did you mean 'food'?"
    assert str(found["food@v9"]) == "adapter 'food' has no version v9"
    assert routes.find("fod") is not routes.find("fod"), "an error that is raised twice grows"
    assert routes.find(None) is None and isinstance(routes.find("food", "food"), InvalidRequest)


def test_what_can_be_no_name_is_not_even_asked_for(routes: Routes) -> None:
    names = {"", "a\n", "\ud800", "x" * 10_000, "a@b@c", "food@v0", "food@sha256:abc"}
    assert routes.missing(names) == set()
    for name in names:
        error = routes.find(name)
        assert isinstance(error, AdapterNotFound) and len(str(error)) < 300


def test_memory_is_bounded_whatever_is_asked_for(catalog: Catalog) -> None:
    routes = Routes(catalog, capacity=100)
    for start in range(0, 100_000, 1000):
        routes.missing(["food"])
        routes.fetch([f"unknown-{number}@v1" for number in range(start, start + 50)])
        routes.fetch(["food"])
        assert len(routes) <= 100
    assert len(routes._names_of) <= 100
    assert not routes.missing(["food", "unknown-99049@v1"]), "the latest, and what is used, stay"
    assert routes.missing(["unknown-0@v1"])


def test_a_change_is_seen_once_it_is_followed(catalog: Catalog, routes: Routes) -> None:
    names = ["food", "prod", "food@v3", "new", "food@v1"]
    routes.fetch(names)
    catalog.add_version("food", version("food", 3))
    catalog.set_alias("prod", {"food@v2": 1})
    catalog.register_version(spec("new"), version("new", 9))
    assert meant(routes.find("food")) == "v2" and isinstance(routes.find("new"), AdapterNotFound)
    routes.follow()
    assert [meant(routes.find(name)) for name in names] == ["v3", "v2", "v3", "v9", "v1"]
    catalog.remove_alias("prod")
    catalog.retire("food", 1)
    catalog.remove("new")
    routes.follow()
    assert isinstance(routes.find("new"), AdapterNotFound) and isinstance(routes.find("prod"), AdapterNotFound)
    assert str(routes.find("food@v1")) == "food@v1 was retired"


def test_too_many_changes_to_follow_one_by_one(
    catalog: Catalog, routes: Routes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then everything may have changed: what is used is read again, the rest is forgotten."""
    monkeypatch.setattr("adapter_router.catalog.routes._MOST_CHANGES", 10)
    unused = [f"unused-{number}" for number in range(20)]
    routes.fetch(unused)
    routes.fetch(["food", "prod"])
    for number in range(30):
        catalog.register(spec(f"n-{number}"))
    catalog.set_alias("food", {"v1": 1})
    routes.follow()
    assert not routes.missing(["food", "prod"]) and meant(routes.find("food")) == "v1"
    assert len(routes) == 10 and len(routes.missing(unused)) == 12
    catalog.set_alias("food", {"v2": 1})
    routes.follow()
    assert meant(routes.find("food")) == "v2", "it follows on from there"


def test_a_database_restored_to_an_earlier_state_is_believed(catalog: Catalog, routes: Routes, tmp_path: Path) -> None:
    """The file is written over with its backup while routers live."""
    backup = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "catalog.db") as live, sqlite3.connect(backup) as copy:
        live.backup(copy)
    catalog.set_alias("food", {"v1": 1})
    routes.fetch(["food"])
    assert meant(routes.find("food")) == "v1"
    with sqlite3.connect(backup) as copy, sqlite3.connect(tmp_path / "catalog.db") as live:
        copy.backup(live)
    routes.follow()
    routes.fetch(routes.missing(["food"]))
    assert meant(routes.find("food")) == "v2"
    catalog.set_alias("food", {"v1": 1})
    routes.follow()
    assert meant(routes.find("food")) == "v1"


def test_a_database_restored_while_it_is_followed_is_believed_by_the_next_call(
    catalog: Interrupted, routes: Routes, tmp_path: Path
) -> None:
    """What has been read then is of an earlier revision than the changes were: it never gets to theirs."""
    backup = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "catalog.db") as live, sqlite3.connect(backup) as copy:
        live.backup(copy)
    routes.fetch(["food"])
    catalog.set_alias("food", {"v1": 1})
    real = catalog.changes

    def changes(*args: Any) -> Any:
        found = real(*args)
        with sqlite3.connect(backup) as copy, sqlite3.connect(tmp_path / "catalog.db") as live:
            copy.backup(live)
        return found

    catalog.changes = changes  # type: ignore[method-assign]
    routes.follow()
    catalog.changes = real  # type: ignore[method-assign]
    catalog.set_alias("food", {"v1": 3, "v2": 1})
    routes.follow()
    assert {meant(routes.find("food", None, str(key))) for key in range(100)} == {"v1", "v2"}


# -- never of the past -------------------------------------------------------------------------------------------


def test_what_was_read_before_a_change_is_not_remembered_after_it(catalog: Interrupted, routes: Routes) -> None:
    routes.fetch(["prod"])

    def change() -> None:
        catalog.set_alias("food", {"v1": 1})
        routes.follow()

    catalog.meanwhile = change
    routes.fetch(["food"])
    assert meant(routes.find("food")) == "v1"


def test_what_comes_into_memory_while_a_change_is_followed_is_brought_up_to_date(
    catalog: Interrupted, routes: Routes
) -> None:
    """A fetch has read before the change, and remembers between the follower's reading and its end."""
    routes.fetch(["food"])
    old = catalog.routes_at(["food@v3"])
    catalog.add_version("food", version("food", 3))

    def remember_old() -> None:
        catalog.routes_at, real = lambda _: old, catalog.routes_at  # type: ignore[method-assign,misc]
        routes.fetch(["food@v3"])
        catalog.routes_at = real  # type: ignore[method-assign]

    catalog.meanwhile = remember_old
    routes.follow()
    assert meant(routes.find("food")) == "v3" and meant(routes.find("food@v3")) == "v3"


def test_nobody_finds_a_gap_while_a_change_is_followed(catalog: Interrupted, routes: Routes) -> None:
    routes.fetch(["food"])
    catalog.set_alias("food", {"v1": 1})
    seen = []
    catalog.meanwhile = lambda: seen.append(meant(routes.find("food")))
    routes.follow()
    assert seen == ["v2"] and meant(routes.find("food")) == "v1"


def test_readers_never_go_back_behind_what_was_followed(catalog_url: str) -> None:
    """A name means ever newer versions; who has seen a change followed sees that one, or one that is newer."""
    catalog = Catalog(catalog_url)
    catalog.register_version(spec("food"), version("food", 1))
    routes = Routes(catalog, capacity=2)
    followed = 1
    done = threading.Event()
    problems: list[object] = []
    reads = [0] * 4

    def read(number: int) -> None:
        while not done.is_set():
            known = followed
            if missing := routes.missing(["food"]):
                routes.fetch(missing)
            routes.fetch([f"other-{number}", f"other-{reads[number]}"])  # pushes it out
            if not routes.missing(["food"]):
                found = routes.find("food")
                if isinstance(found, AdapterVersion) and int(meant(found)[1:]) < known:
                    problems.append((known, found))
            reads[number] += 1

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(reads))]
    for thread in threads:
        thread.start()
    try:
        while followed < 60 or min(reads) < 20:
            catalog.add_version("food", version("food", followed + 1))
            routes.follow()
            followed += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert problems == []
    catalog.close()


# -- what is not servable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", [None, AdapterRejected("rank", None, ("one", "two")), AdapterUnavailable("hangs")])
def test_an_adapter_without_a_version(
    catalog: Catalog, routes: Routes, phase: Phase, error: AdapterRouterError | None
) -> None:
    catalog.register(spec("late"))
    if error is not None:
        catalog.set_phase("late", "Failed", error)
    if phase != "Failed" or error is None:
        catalog.set_phase("late", phase)
    routes.fetch(["late"])
    found = routes.find("late")
    reason_known = error is not None and phase in ("Failed", "Fetching", "Validating")
    if phase == "Retired":
        assert isinstance(found, AdapterNotFound) and "retired" in str(found)
    elif phase == "Ready":
        assert isinstance(found, AdapterFailed) and "means none" in str(found), "to try again would not help"
    elif reason_known and error is not None:
        assert isinstance(found, AdapterUnavailable if error.retryable else AdapterFailed)
        assert str(error) in str(found) and found.problems == error.problems
    else:
        assert isinstance(found, AdapterUnavailable) and "being fetched" in str(found)
    under_way = phase in ("Registered", "Fetching", "Validating")
    assert routes.is_pending("late", [BASE]) == (under_way and not reason_known)


@pytest.mark.parametrize(
    ("base", "served", "pending"),
    [
        (None, [BASE], False),
        (None, ["other"], True),
        ("other", ["other"], True),
        ("mine", ["other"], False),
        (None, ["other", BASE], False),
    ],
)
def test_an_adapter_of_another_base_is_checked_again(
    catalog: Catalog, routes: Routes, base: str | None, served: list[str], pending: bool
) -> None:
    catalog.register_version(spec("a", base=base), version("a", 1))
    routes.fetch(["a", "a@v1", "nobody"])
    assert routes.is_pending("a", served) == pending
    assert not routes.is_pending("a@v1", served), "that version is of its base"
    assert not routes.is_pending("nobody", served) and not routes.is_pending("never fetched", served)


def test_a_retired_adapter_is_not_found_under_any_address(catalog: Catalog, routes: Routes) -> None:
    catalog.set_phase("food", "Retired")
    routes.fetch(["food", "food@v1"])
    for name in ("food", "food@v1"):
        found = routes.find(name)
        assert isinstance(found, AdapterNotFound) and "retired" in str(found)


def test_mixes(catalog: Catalog, routes: Routes) -> None:
    catalog.register(spec("broken"))
    catalog.set_phase("broken", "Failed", AdapterRejected("rank"))
    catalog.register(spec("late"))
    routes.fetch(["food", "prod", "broken", "late", "nobody", "else"])
    mix = routes.find({"food": 0.5, "prod": 0.5})
    assert isinstance(mix, AdapterVersion) and {part.version.digest for part in mix.parts} == {digest(1), digest(2)}
    one = routes.find({"food": 1, "nobody": 1})
    assert isinstance(one, AdapterNotFound) and one.problems == ()
    two = routes.find({"nobody": 1, "else": 1})
    assert isinstance(two, AdapterNotFound) and len(two.problems) == 2
    worst = routes.find({"late": 1, "broken": 1, "food": 1})
    assert isinstance(worst, AdapterFailed) and len(worst.problems) == 2, "waiting for the late one helps nobody"
    both = routes.find({"late": 1, "never fetched": 1})
    assert isinstance(both, AdapterUnavailable)


# -- splitting ---------------------------------------------------------------------------------------------------

VERSIONS = [version("food", number) for number in range(1, 6)]
weights_of_several = st.lists(st.integers(1, 1000), min_size=2, max_size=5)


@given(weights_of_several, st.data())
@settings(max_examples=60, deadline=None)
def test_a_share_that_grows_only_wins_keys(weights: list[int], data: st.DataObject) -> None:
    grown = data.draw(st.integers(0, len(weights) - 1))
    more = weights.copy()
    more[grown] += data.draw(st.integers(1, 1000))
    before, after = list(zip(VERSIONS, weights, strict=False)), list(zip(VERSIONS, more, strict=False))
    for key in map(str, range(200)):
        was, now = choose("food", before, key), choose("food", after, key)
        assert now in (was, VERSIONS[grown])
        assert choose("food", before[::-1], key) == was, "whatever the order"


@given(weights_of_several)
@settings(max_examples=20, deadline=None)
def test_a_version_that_goes_gives_away_only_its_own_keys(weights: list[int]) -> None:
    before = list(zip(VERSIONS, weights, strict=False))
    for key in map(str, range(200)):
        was, now = choose("food", before, key), choose("food", before[1:], key)
        assert was == now or was == VERSIONS[0]


@pytest.mark.parametrize("keyed", [True, False])
def test_shares_are_what_the_weights_say(keyed: bool) -> None:
    weights = [70, 25, 5]
    choices = list(zip(VERSIONS, weights, strict=False))
    count = Counter(choose("food", choices, f"user-{n}" if keyed else None).digest for n in range(20_000))
    for (each, weight), seen in zip(choices, (count[v.digest] for v in VERSIONS), strict=False):
        assert seen == pytest.approx(200 * weight, abs=6 * (200 * weight) ** 0.5), each.digest


def test_names_split_their_keys_independently() -> None:
    choices = [(VERSIONS[0], 1), (VERSIONS[1], 1)]
    same = sum(choose("food", choices, str(key)) == choose("drinks", choices, str(key)) for key in range(2000))
    assert 800 < same < 1200, "the same users would always get what is new"
