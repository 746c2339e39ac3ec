"""The catalog on both databases: what it accepts, what it says, and what it remembers."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from adapter_router.catalog import migrations
from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec, Target
from adapter_router.catalog.tables import HEAD, metadata
from adapter_router.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogUnavailable,
    InvalidRequest,
)
from adapter_router.types import AdapterVersion, EmbeddingSettings, Source
from tests.catalogs import BASE, digest, spec, version
from tests.postgres import PostgreSQL


class Watch:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def catalog(catalog_url: str, watch: Watch) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url, now=watch)
    yield catalog
    catalog.close()


def targets(catalog: Catalog, name: str) -> dict[str, int]:
    return {f"{t.adapter}@v{t.number}": t.weight for t in catalog.alias(name).targets}


# -- registrations -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read_also_after_a_restart(catalog_url: str) -> None:
    source = Source("s3://bucket/ä\udcff", "main", digest(1), "secret")
    wanted = AdapterSpec("表/one two", source, "base", "embedding", ("a", "ü\0"), pinned=True, preload=True, lazy=True)
    embedding = EmbeddingSettings("cls", False, 12, "query: ")
    full = AdapterVersion(
        wanted.name, digest(1), Path("/s\udcff"), "embedding", ("ü\0",), "none", embedding, True, 1 << 40,
        source=source, base="b",
    )  # fmt: skip
    first = Catalog(catalog_url)
    registered = first.register(wanted, managed=True)
    added = first.add_version(wanted.name, full)
    alias, events = first.alias(wanted.name), first.events()
    first.close()
    again = Catalog(catalog_url)
    assert registered.spec == wanted and registered.phase == "Registered" and registered.managed
    assert again.registration(wanted.name).spec == wanted and again.registration(wanted.name).phase == "Ready"
    assert again.versions(wanted.name) == [added] and added.version == full
    assert again.alias(wanted.name) == alias and again.events() == events
    assert again.routes([wanted.name])[wanted.name].choices == ((full, 1),)
    again.close()


def test_what_cannot_be_a_name_is_refused_and_never_found(catalog: Catalog) -> None:
    catalog.register(spec("there"))
    catalog.add_version("there", version("there", 1))
    for name in ("", "a\nb", "\x00", "\ud800", " a", "a ", "a@v1", "a@", "a" * 201):
        for attempt in (catalog.check_name, lambda n: catalog.register(spec(n))):
            with pytest.raises(InvalidRequest, match="cannot name an adapter"):
                attempt(name)
        with pytest.raises(InvalidRequest, match="cannot name an adapter"):
            catalog.set_alias(name, {"there@v1": 1})
        for attempt in (catalog.registration, catalog.remove, catalog.alias, catalog.versions, catalog.rollback):
            with pytest.raises(AdapterNotFound):
                attempt(name)
        assert catalog.events(name) == [] and catalog.routes([name]) == {} and not catalog.claim(name, "me", 1)
    assert catalog.num_registered() == 1 and [alias.name for alias in catalog.aliases()] == ["there"]


def test_a_name_is_taken_once_by_an_adapter_or_an_alias(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    catalog.add_version("food", version("food", 1))
    catalog.set_alias("prod", {"food@v1": 1})
    with pytest.raises(AdapterExists, match="'food' is loaded already"):
        catalog.register(spec("food"))
    with pytest.raises(AdapterExists):
        catalog.check_name("food")
    catalog.check_name("food", replace=True)
    for attempt in (catalog.check_name, lambda n, **_: catalog.register(spec(n), replace=True)):
        with pytest.raises(InvalidRequest, match="'prod' is an alias"):
            attempt("prod", replace=True)
    assert catalog.num_registered() == 1


def test_a_replaced_one_means_what_it_did_until_the_new_version_is_there(catalog: Catalog) -> None:
    catalog.register(spec("food", "/old"))
    old = catalog.add_version("food", version("food", 1, source=Source("/old")))
    catalog.set_phase("food", "Failed", AdapterUnavailable("later"), retry_at=5.0, attempts=3)
    anew = catalog.register(spec("food", "/new", pinned=True), replace=True)
    assert (anew.phase, anew.attempts, anew.reason, anew.retry_at) == ("Registered", 0, None, None)
    assert catalog.routes(["food"])["food"].choices == ((old.version, 1),)
    with pytest.raises(AdapterConflict, match="another source"):
        catalog.add_version("food", version("food", 2, source=Source("/old")))
    new = catalog.add_version("food", version("food", 2, source=Source("/new")))
    assert new.number == 2 and catalog.routes(["food"])["food"].choices == ((new.version, 1),)
    assert catalog.num_registered() == 1


def test_an_unknown_name_is_answered_with_close_ones_among_thousands(catalog: Catalog) -> None:
    catalog.reconcile([spec(f"tenant-{number:04}") for number in range(0, 1000, 2)] + [spec("weather")])
    with pytest.raises(AdapterNotFound, match=r"no adapter is named 'wether'; did you mean 'weather'\?"):
        catalog.registration("wether")
    with pytest.raises(AdapterNotFound) as caught:
        catalog.registration("tenant-0501")
    assert str(caught.value).count("'tenant-0") == 4
    for attempt in (catalog.versions, catalog.remove, catalog.alias, catalog.rollback, catalog.remove_alias):
        with pytest.raises(AdapterNotFound, match=r"no adapter is named 'zzz'$"):
            attempt("zzz")
    assert not catalog.claim("zzz", "me", 5)


def test_registrations_come_in_pages_by_name(catalog: Catalog) -> None:
    names = sorted(["b", "a", "Z", "ä", "aa", "a-1", "表", "a b", "_"])
    for name in names:
        catalog.register(spec(name))
    catalog.set_phase("aa", "Fetching")
    pages: list[str] = []
    while page := catalog.registrations(after=pages[-1] if pages else None, limit=2):
        assert len(page) <= 2
        pages += [registration.spec.name for registration in page]
    assert pages == names
    assert [r.spec.name for r in catalog.registrations(phase="Fetching")] == ["aa"]
    assert [alias.name for alias in catalog.aliases(after="aa", limit=2)] == ["b", "ä"]


def test_a_failure_is_remembered_until_it_is_over(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    failed = catalog.set_phase("food", "Failed", AdapterRejected.because(["one", "two"]), attempts=1)
    assert (failed.problems, failed.code, failed.retryable) == (("one", "two"), "adapter_invalid", False)
    assert "one" in str(failed.reason) and failed.attempts == 1
    fetching = catalog.set_phase("food", "Fetching")
    assert fetching.problems == ("one", "two") and fetching.attempts == 1
    again = catalog.set_phase("food", "Failed", AdapterUnavailable("a\0b\ud800"), retry_at=1234.5, attempts=2)
    assert (again.reason, again.retryable, again.retry_at, again.problems) == ("a\0b\ud800", True, 1234.5, ())
    assert catalog.registration("food") == again
    anew = catalog.set_phase("food", "Registered")
    assert anew.reason is None and anew.retry_at is None


@pytest.mark.parametrize("how", ["replaced", "removed", "finished"])
def test_news_of_what_has_been_superseded_is_no_news(catalog: Catalog, how: str) -> None:
    """Be it that the adapter began anew, from the same source too, or that another router has finished it."""
    old = catalog.register(spec("food"))
    if how == "finished":
        catalog.add_version("food", version("food", 1))
    else:
        if how == "removed":
            catalog.remove("food")
        catalog.register(spec("food"), replace=True)
    now, revision = catalog.registration("food"), catalog.revision()
    assert catalog.set_phase("food", "Failed", AdapterRejected("no"), of=old) == now
    with pytest.raises(AdapterConflict, match="meanwhile"):
        catalog.add_version("food", version("food", 2), of=old)
    assert catalog.revision() == revision
    catalog.pin("food", True)
    assert catalog.set_phase("food", "Fetching", of=now).phase == "Fetching", "a flag makes nothing new"
    assert catalog.add_version("food", version("food", 2), of=now).version.digest == digest(2)


def test_a_removed_one_leaves_nothing_and_its_name_begins_anew(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    added = [catalog.add_version("food", version("food", number)).version for number in (1, 2)]
    catalog.set_alias("prod", {"food@v1": 1})
    with pytest.raises(InvalidRequest, match="'food' cannot be removed: 'prod' leads to it"):
        catalog.remove("food")
    catalog.remove_alias("prod")
    assert catalog.holds(digest(1))
    assert catalog.remove("food") == added
    assert not catalog.holds(digest(1)) and catalog.num_registered() == 0 and catalog.aliases() == []
    catalog.register(spec("food"))
    assert catalog.add_version("food", version("food", 9)).number == 1
    with pytest.raises(InvalidRequest, match="meant nothing else before"):
        catalog.rollback("food")


# -- claims ------------------------------------------------------------------------------------------------------


def test_one_owner_works_on_a_registration_until_it_lets_go_or_dies(catalog: Catalog, watch: Watch) -> None:
    catalog.register(spec("food"))
    catalog.register(spec("drinks"))
    assert catalog.unfinished() == ["food", "drinks"] or catalog.unfinished() == ["drinks", "food"]
    assert catalog.claim("food", "one", 10) and not catalog.claim("food", "two", 10)
    assert catalog.unfinished() == ["drinks"]
    catalog.release("food", "two")
    assert not catalog.claim("food", "two", 10), "only the owner can give it back"
    watch.now += 8
    assert catalog.claim("food", "one", 10)
    watch.now += 8
    assert catalog.unfinished() == ["drinks"], "prolonged"
    catalog.set_phase("food", "Validating")
    assert catalog.unfinished() == ["drinks"], "a phase is no end of a claim"
    watch.now += 2
    assert set(catalog.unfinished()) == {"food", "drinks"}, "its owner is dead"
    assert catalog.claim("food", "two", 10) and not catalog.claim("food", "one", 10)
    catalog.release("food", "two")
    assert set(catalog.unfinished()) == {"food", "drinks"} and len(catalog.unfinished(1)) == 1


def test_what_is_unfinished(catalog: Catalog, watch: Watch) -> None:
    for name in ("ready", "refused", "later", "retired", "fetching"):
        catalog.register(spec(name))
    catalog.register(spec("lazy", lazy=True))
    catalog.register(spec("wanted", lazy=True))
    catalog.add_version("ready", version("ready", 1))
    catalog.set_phase("refused", "Failed", AdapterRejected("no"))
    catalog.set_phase("later", "Failed", AdapterUnavailable("hangs"), retry_at=watch.now + 5)
    catalog.set_phase("retired", "Retired")
    catalog.set_phase("fetching", "Fetching")
    catalog.set_phase("wanted", "Fetching")
    assert set(catalog.unfinished()) == {"fetching", "wanted"}
    watch.now += 5
    assert set(catalog.unfinished()) == {"fetching", "wanted", "later"}


# -- versions ----------------------------------------------------------------------------------------------------


def test_the_same_content_is_the_same_version(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    first = catalog.add_version("food", version("food", 1))
    second = catalog.add_version("food", version("food", 2), activate=False)
    assert targets(catalog, "food") == {"food@v1": 1}
    assert catalog.add_version("food", version("food", 1)) == first
    assert catalog.add_version("food", version("food", 2)) == second and targets(catalog, "food") == {"food@v2": 1}
    relabelled = catalog.add_version("food", version("food", 1, labels=("a", "b")))
    rebased = catalog.add_version("food", version("food", 1, base="sha256:other"))
    assert [relabelled.number, rebased.number] == [3, 4]
    routes = catalog.routes([f"food@{digest(1)}", "food@v1", f"food@{digest(2)[:19]}", f"food@{digest(2)}"])
    assert routes[f"food@{digest(1)}"].choices == ((rebased.version, 1),), "the newest of this content"
    assert routes["food@v1"].choices == ((first.version, 1),)
    assert f"food@{digest(2)[:19]}" not in routes, "two digests begin so"
    assert [record.number for record in catalog.versions("food")] == [1, 2, 3, 4]


def test_what_is_known_already_can_leave_the_name_as_it_is(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    for number in (1, 2):
        catalog.add_version("food", version("food", number), activate=None)
    assert targets(catalog, "food") == {"food@v2": 1}, "they were new"
    catalog.rollback("food")
    catalog.add_version("food", version("food", 2), activate=None)
    assert targets(catalog, "food") == {"food@v1": 1}
    catalog.set_alias("food", {"v1": 90, "v2": 10})
    catalog.add_version("food", version("food", 2), activate=None)
    assert targets(catalog, "food") == {"food@v1": 90, "food@v2": 10}
    catalog.rollback("food")
    catalog.retire("food", 2)
    catalog.add_version("food", version("food", 2), activate=None)
    assert catalog.versions("food")[1].retired is not None


def test_a_version_follows_its_content_to_another_source(catalog: Catalog) -> None:
    catalog.register(spec("food", "/old"))
    catalog.add_version("food", version("food", 1, source=Source("/old")))
    catalog.set_alias("prod", {"food@v1": 1})
    revision = catalog.revision()
    catalog.register(spec("food", "/new"), replace=True)
    moved = catalog.add_version("food", version("food", 1, source=Source("/new")))
    assert moved.number == 1 and moved.version.source == Source("/new")
    assert catalog.routes(["prod"])["prod"].choices == ((moved.version, 1),)
    changes = catalog.changes(revision)
    assert changes is not None and changes[1] == {"food", "prod"}


def test_registering_with_a_version_is_one_change_or_none(catalog: Catalog) -> None:
    with pytest.raises(AdapterConflict):
        catalog.register_version(spec("food", "/new"), version("food", 1, source=Source("/old")))
    assert catalog.num_registered() == 0 and catalog.revision() == 0 and catalog.events() == []
    record = catalog.register_version(spec("food"), version("food", 1))
    assert record.number == 1 and catalog.registration("food").phase == "Ready"
    with pytest.raises(AdapterExists):
        catalog.register_version(spec("food"), version("food", 2))
    assert catalog.register_version(spec("food"), version("food", 2), replace=True).number == 2
    assert targets(catalog, "food") == {"food@v2": 1}


def test_a_retired_version_cannot_be_asked_for_until_it_is_found_again(catalog: Catalog, watch: Watch) -> None:
    catalog.register(spec("food"))
    for number in (1, 2):
        catalog.add_version("food", version("food", number))
    with pytest.raises(InvalidRequest, match="food@v2 cannot be retired: 'food' leads to it"):
        catalog.retire("food", 2)
    with pytest.raises(AdapterNotFound, match="no version v3"):
        catalog.retire("food", 3)
    assert catalog.retire("food", 1).retired == watch.now
    assert not catalog.holds(digest(1)) and catalog.holds(digest(2))
    assert "food@v1" not in catalog.routes(["food@v1"])
    with pytest.raises(InvalidRequest, match="food@v1 was retired"):
        catalog.set_alias("food", {"v1": 1})
    with pytest.raises(InvalidRequest, match="food@v1 was retired"):
        catalog.rollback("food")
    revision = catalog.revision()
    catalog.retire("food", 1)
    assert catalog.revision() == revision, "it was already"
    back = catalog.add_version("food", version("food", 1), activate=False)
    assert back.number == 1 and back.retired is None and catalog.routes(["food@v1"])


# -- names -------------------------------------------------------------------------------------------------------


def test_a_name_means_versions_in_shares(catalog: Catalog) -> None:
    for name in ("food", "drinks"):
        catalog.register(spec(name))
        for number in (1, 2):
            catalog.add_version(name, version(name, number + 10 * (name == "drinks")))
    split = catalog.set_alias("food", {"v1": 90, "v2": 10, "drinks@v1": 0})
    assert split.targets == (Target("drinks", 1, 0), Target("food", 1, 90), Target("food", 2, 10))
    assert [weight for _, weight in catalog.routes(["food"])["food"].choices] == [90, 10], "0 is no choice"
    with pytest.raises(InvalidRequest, match="'food' leads to it"):
        catalog.remove("drinks")
    by_digest = catalog.set_alias("prod", {f"food@{digest(2)}": 1, "drinks@v2": 2})
    assert by_digest.targets == (Target("drinks", 2, 2), Target("food", 2, 1))
    assert catalog.routes(["prod"])["prod"].registration is None


def test_every_problem_of_an_alias_is_told_at_once(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    catalog.add_version("food", version("food", 1))
    weights: Any = {"v1": 1, f"food@{digest(1)}": 2, "v7": -1, "nobody@v1": 1.5, "food": True, "v0": 10**9}
    with pytest.raises(InvalidRequest) as caught:
        catalog.set_alias("food", weights)
    said = caught.value.problems
    for words in (
        "named twice",
        "'v7' is -1",
        "no version v7",
        "1.5",
        "'nobody'",
        "True",
        "'food' is no version",
        "'v0'",
    ):
        assert any(words in problem for problem in said), words
    for wrong in ({}, {"v1": 0}, {f"v{n}": 1 for n in range(1, 30)}):
        with pytest.raises(InvalidRequest, match=r"all weights are 0|must be 1 to 16"):
            catalog.set_alias("food", wrong)
    assert targets(catalog, "food") == {"food@v1": 1}


def test_who_expects_another_revision_changes_nothing(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    for number in (1, 2):
        catalog.add_version("food", version("food", number))
    seen = catalog.alias("food").revision
    first = catalog.set_alias("food", {"v1": 1}, expected=seen)
    with pytest.raises(AdapterConflict) as caught:
        catalog.set_alias("food", {"v2": 1}, expected=seen)
    assert caught.value.status == 409
    with pytest.raises(AdapterConflict):
        catalog.rollback("food", expected=seen)
    assert catalog.alias("food") == first
    catalog.set_alias("prod", {"food@v1": 1}, expected=0)
    with pytest.raises(AdapterConflict):
        catalog.set_alias("prod", {"food@v2": 1}, expected=0)


def test_rollback_undoes_one_change_after_another(catalog: Catalog) -> None:
    catalog.register(spec("food"))
    for number in (1, 2, 3):
        catalog.add_version("food", version("food", number))
    catalog.set_alias("food", {"v3": 1, "v1": 1})
    revision = catalog.revision()
    assert catalog.set_alias("food", {"v1": 1, "v3": 1}).revision == revision, "the same again is no change"
    seen = [targets(catalog, "food")]
    for _ in range(3):
        catalog.rollback("food")
        seen.append(targets(catalog, "food"))
    assert seen == [{"food@v1": 1, "food@v3": 1}, {"food@v3": 1}, {"food@v2": 1}, {"food@v1": 1}]
    with pytest.raises(InvalidRequest, match="meant nothing else before"):
        catalog.rollback("food")
    for turn in range(120):
        catalog.set_alias("food", {f"v{turn % 3 + 1}": 1})
    undone = 0
    with pytest.raises(InvalidRequest, match="meant nothing else before"):
        for undone in itertools.count():  # noqa: B007 - its last value counts
            catalog.rollback("food")
    assert undone == 100


def test_rollback_to_what_is_gone_is_refused(catalog: Catalog) -> None:
    for name in ("food", "drinks"):
        catalog.register(spec(name))
        catalog.add_version(name, version(name, 1))
    catalog.set_alias("prod", {"drinks@v1": 1})
    catalog.set_alias("prod", {"food@v1": 1})
    catalog.remove("drinks")
    catalog.register(spec("drinks"))
    catalog.add_version("drinks", version("drinks", 99))
    with pytest.raises(InvalidRequest, match="1 of the versions it meant went with their adapters"):
        catalog.rollback("prod")
    assert targets(catalog, "prod") == {"food@v1": 1}
    with pytest.raises(InvalidRequest, match="own name"):
        catalog.remove_alias("food")


def test_what_replicas_shall_hold(catalog: Catalog) -> None:
    for name, fields in {"plain": {}, "early": {"preload": True}, "always": {"pinned": True}, "other": {}}.items():
        catalog.register(spec(name, **fields))
    catalog.register(spec("not-yet", pinned=True))
    same = version("plain", 7)
    catalog.add_version("plain", same)
    catalog.add_version("early", version("early", 1))
    catalog.add_version("early", version("early", 2))
    catalog.add_version("always", version("always", 2))
    catalog.add_version("other", version("other", 3, base="another"))
    catalog.pin("other", True)
    catalog.set_alias("early", {"v1": 1, "v2": 1})
    assert {(v.digest, pinned) for v, pinned in catalog.preloaded(BASE)} == {(digest(1), False), (digest(2), True)}
    assert [v.digest for v, _ in catalog.preloaded("another")] == [digest(3)]
    catalog.preload("plain", True)
    catalog.preload("early", False)
    assert {v.digest for v, _ in catalog.preloaded(BASE)} == {digest(2), digest(7)}
    catalog.set_phase("always", "Retired")
    assert {v.digest for v, _ in catalog.preloaded(BASE)} == {digest(7)}


# -- news --------------------------------------------------------------------------------------------------------


def test_everything_that_happens_is_an_event(catalog: Catalog, watch: Watch) -> None:
    catalog.register(spec("food", "s3://b/food"))
    catalog.register(spec("drinks"))
    watch.now += 1
    catalog.add_version("food", version("food", 1))
    catalog.pin("food", True)
    catalog.pin("food", True)
    catalog.claim("food", "me", 5)
    catalog.set_alias("prod", {"food@v1": 3})
    catalog.remove_alias("prod")
    catalog.remove("food")
    events = catalog.events()
    assert [(e.name, e.kind) for e in events] == [
        ("food", "registered"),
        ("drinks", "registered"),
        ("food", "version"),
        ("food", "alias"),
        ("food", "pinned"),
        ("prod", "alias"),
        ("prod", "alias-removed"),
        ("food", "removed"),
    ]
    assert [e.revision for e in events] == [*range(1, 9)] and catalog.revision() == 8
    assert json.loads(events[0].detail)["uri"] == "s3://b/food" and events[2].at == events[0].at + 1
    assert json.loads(events[5].detail) == {"food@v1": 3}
    assert [e.revision for e in catalog.events("food", after=3, limit=2)] == [4, 5]


def test_changes_since(catalog: Catalog) -> None:
    for name in ("a", "b", "c"):
        catalog.register_version(spec(name), version(name, 1))
    catalog.set_alias("leads", {"a@v1": 1})
    since = catalog.revision()
    assert catalog.changes(since) == (since, frozenset())
    catalog.pin("a", True)
    assert catalog.changes(since) == (since + 1, {"a", "leads"})
    assert catalog.changes(since, limit=1) is None, "more than asked for"
    assert catalog.changes(since + 99) is None, "a revision from the future: another database, or a restored one"
    for turn in range(30):
        catalog.pin("b", bool(turn % 2))
    assert catalog.changes(since, limit=2) is None


def test_old_events_go_and_whoever_needs_them_is_told(catalog_url: str) -> None:
    catalog = Catalog(catalog_url, kept_events=10)
    catalog.register(spec("food"))
    for turn in range(20):
        catalog.pin("food", turn % 2 == 0)
    assert [event.revision for event in catalog.events()] == [*range(12, 22)]
    assert catalog.changes(10) is None and catalog.changes(11) == (21, {"food"})
    catalog.close()


# -- databases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "catalog.db", "sqlite://", "sqlite:///:memory:", "mysql://u:geheim@h/d", "postgresql+asyncpg://u:geheim@h/d"],
)
def test_other_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///") as caught:
        Catalog(url)
    assert "geheim" not in str(caught.value)


def test_a_database_that_does_not_answer_is_an_error_to_try_again(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailable) as caught:
        Catalog("postgresql+psycopg://u:geheim@127.0.0.1:1/nothing")
    assert caught.value.retryable and "geheim" not in str(caught.value)
    (tmp_path / "catalog.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(CatalogUnavailable, match="not a database"):
        Catalog(f"sqlite:///{tmp_path}/catalog.db")


def test_a_schema_of_newer_code_is_refused(catalog: Catalog, catalog_url: str) -> None:
    engine = create_engine(catalog_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ValueError, match="has schema 9999 and this version of adapter-router knows"):
        Catalog(catalog_url)
    catalog.register(spec("food"))  # who had it open goes on


def test_migrations_lead_to_the_tables_that_the_code_knows(catalog: Catalog, catalog_url: str) -> None:
    (directory,) = migrations.__path__
    assert ScriptDirectory(directory).get_heads() == [HEAD]
    engine = create_engine(catalog_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()
    assert catalog.revision() == 0


def test_a_catalog_of_older_code_is_upgraded_with_all_it_holds(
    catalog_url: str,
) -> None:
    catalog = Catalog(catalog_url)
    catalog.register_version(spec("food"), version("food", 1))
    catalog.close()
    engine = create_engine(catalog_url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE adapters DROP COLUMN began"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    catalog = Catalog(catalog_url)
    read = catalog.registration("food")
    assert read.began == 0 and targets(catalog, "food") == {"food@v1": 1}
    assert catalog.set_phase("food", "Fetching", of=read).phase == "Fetching"
    assert catalog.register(spec("food"), replace=True).began == catalog.revision()
    catalog.close()


def test_a_server_that_is_lost_without_a_word_is_noticed(postgres: PostgreSQL) -> None:
    """Within half a minute: without these, threads that wait for its answer would do so for hours."""
    catalog = Catalog(postgres.new_database())
    with catalog._database.reading() as connection:
        raw: Any = connection.connection.dbapi_connection
        with socket.socket(fileno=os.dup(raw.fileno())) as line:
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            idle, interval, count = (line.getsockopt(socket.IPPROTO_TCP, option) for option in options)
            unanswered = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    assert idle + interval * count <= 30 and 0 < unanswered <= 30
    catalog.close()


def test_a_catalog_of_ones_own_is_nobody_elses(tmp_path: Path) -> None:
    Catalog(f"sqlite:///{tmp_path}/deep/er/catalog.db").close()
    assert (tmp_path / "deep" / "er").stat().st_mode & 0o777 == 0o700
