"""The catalog and the router's memory of it against plain dictionaries, whatever is done to them in whatever order."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete, text

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.database import Database
from adapter_router.catalog.records import PHASES, AdapterSpec, Registration
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.tables import metadata
from adapter_router.errors import AdapterConflict, AdapterRejected, AdapterRouterError, AdapterUnavailable
from adapter_router.types import AdapterVersion, Source
from tests.catalog_model import Look, Meaning, Model, alias_of, outcome
from tests.postgres import PostgreSQL

NAMES = ("a", "b", "ab")
ALIASES = ("prod", "b2")
DIGESTS = (f"sha256:{'a' * 64}", f"sha256:{'a' * 12}{'b' * 52}", f"sha256:{'b' * 64}")
ADDRESSES = (
    *NAMES,
    *ALIASES,
    "a@v1",
    "a@v2",
    "b@v1",
    "ab@v3",
    f"a@{DIGESTS[0]}",
    f"a@{DIGESTS[0][:19]}",
    f"b@{DIGESTS[1][:19]}",
    f"b@{DIGESTS[2]}",
    "prod@v1",
    "a@v",
)
BASES = ("base-1", "base-2")
CAPACITY = 8

names = st.sampled_from(NAMES)
any_names = st.sampled_from((*NAMES, *ALIASES))
sources = st.sampled_from((Source("/1"), Source("/2", revision="main")))
specs = st.builds(AdapterSpec, names, sources, pinned=st.booleans(), preload=st.booleans(), lazy=st.booleans())
versions = st.builds(
    AdapterVersion,
    st.just("?"),
    st.sampled_from(DIGESTS),
    st.just(Path("/store")),
    st.just("text-classification"),
    st.sampled_from((("x", "y"), ("n", "m"))),
    st.just("softmax"),
    base=st.sampled_from(BASES),
    source=st.sampled_from((None, None, None, Source("/1"), Source("/2", revision="main"))),
    num_bytes=st.integers(0, 2),
)
failures = st.sampled_from((None, AdapterRejected("no", None, ("one", "two\0")), AdapterUnavailable("later")))
any_weights = st.dictionaries(
    st.sampled_from([f"{name}@{version}" for name in NAMES for version in ("v1", "v2", DIGESTS[2])]),
    st.integers(0, 3),
    max_size=3,
)


class CatalogMachine(RuleBasedStateMachine):
    """After every step the catalog shows what the dictionaries do, and memory nothing older than what it followed."""

    open: ClassVar[Callable[[Callable[[], float]], Catalog]]
    steps: ClassVar[int] = 0
    refusals: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.catalog = type(self).open(lambda: self.model.now)
        self.routes = Routes(self.catalog, CAPACITY)
        self.since_followed: list[dict[str, Meaning]] = []
        self.revision = 0
        self.seen: dict[str, Meaning] = dict.fromkeys(ADDRESSES)
        self.looked: dict[str, tuple[Registration, Look]] = {}  # what those who work on an adapter have read of it

    def teardown(self) -> None:
        self.catalog.close()

    def both(self, real: Callable[[], Any], model: Callable[[], Any]) -> Any:
        """Do the same to both; they agree on whether it can be done, and on why not."""
        expected: type[Exception] | None = None
        try:
            result = model()
        except AdapterRouterError as error:
            expected = type(error)
            type(self).refusals += 1
        try:
            got = real()
        except AdapterRouterError as error:
            assert type(error) is expected, error
            return None
        assert expected is None, f"{expected} was not raised"
        return got, result

    @initialize(
        registered=st.lists(st.tuples(specs, st.lists(versions, min_size=1, max_size=2)), min_size=2, max_size=3)
    )
    def begin(self, registered: list[tuple[AdapterSpec, list[AdapterVersion]]]) -> None:
        """With something, or most of what is tried would be refused."""
        for spec, found in registered:
            self.register(spec, replace=True, managed=False)
            for version in found:
                self.add_version(spec.name, replace(version, source=spec.source), activate=True)

    # -- registrations -------------------------------------------------------------------------------------------

    @rule(spec=specs, replace=st.booleans(), managed=st.booleans())
    def register(self, spec: AdapterSpec, replace: bool, managed: bool) -> None:
        self.both(
            lambda: self.catalog.register(spec, replace=replace, managed=managed),
            lambda: self.model.register(spec, replace=replace, managed=managed),
        )

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.both(lambda: self.catalog.remove(name), lambda: self.model.remove(name))

    @rule(name=names)
    def look(self, name: str) -> None:
        """As somebody does who begins to work on it, and will tell of that later."""
        if looked := self.both(lambda: self.catalog.registration(name), lambda: self.model.look(name)):
            self.looked[name] = looked

    @rule(
        name=names, phase=st.sampled_from(PHASES), error=failures, wait=st.sampled_from((None, 0, 5)), of=st.booleans()
    )
    def set_phase(self, name: str, phase: Any, error: AdapterRouterError | None, wait: float | None, of: bool) -> None:
        error = error if phase == "Failed" else None
        retry_at = None if wait is None or error is None else self.model.now + wait
        read, looked = self.looked.get(name, (None, None)) if of else (None, None)
        self.both(
            lambda: self.catalog.set_phase(name, phase, error, retry_at, of=read),
            lambda: self.model.set_phase(name, phase, error, retry_at, looked),
        )

    @rule(name=names, flag=st.sampled_from(("pinned", "preload")), value=st.booleans())
    def flag(self, name: str, flag: str, value: bool) -> None:
        real = self.catalog.pin if flag == "pinned" else self.catalog.preload
        self.both(lambda: real(name, value), lambda: self.model.flag(name, flag, value))

    @rule(name=names, owner=st.sampled_from("xy"), seconds=st.sampled_from((1, 10)))
    def claim(self, name: str, owner: str, seconds: float) -> None:
        got, expected = self.both(
            lambda: self.catalog.claim(name, owner, seconds), lambda: self.model.claim(name, owner, seconds)
        )
        assert got == expected

    @rule(name=names, owner=st.sampled_from("xy"))
    def release(self, name: str, owner: str) -> None:
        self.both(lambda: self.catalog.release(name, owner), lambda: self.model.release(name, owner))

    @rule(seconds=st.sampled_from((1, 7)))
    def wait(self, seconds: float) -> None:
        self.model.now += seconds

    @rule(declared=st.lists(specs, max_size=3, unique_by=lambda spec: spec.name))
    def reconcile(self, declared: list[AdapterSpec]) -> None:
        found = self.catalog.drift(declared)
        done = self.catalog.reconcile(declared)
        self.model.reconcile(declared)
        assert {difference.name for difference in found} == {difference.name for difference in done}
        assert all(difference.kind == "conflict" for difference in self.catalog.drift(declared))

    # -- versions and names --------------------------------------------------------------------------------------

    @rule(name=names, version=versions, activate=st.sampled_from((True, False, None)), of=st.booleans())
    def add_version(self, name: str, version: AdapterVersion, activate: bool | None, of: bool = False) -> None:
        version = _of(version, name)
        read, looked = self.looked.get(name, (None, None)) if of else (None, None)
        results = self.both(
            lambda: self.catalog.add_version(name, version, activate=activate, of=read),
            lambda: self.model.add_version(name, version, activate, looked),
        )
        assert results is None or results[0] == results[1]

    @rule(spec=specs, version=versions, replace=st.booleans())
    def register_version(self, spec: AdapterSpec, version: AdapterVersion, replace: bool) -> None:
        version = _of(version, spec.name, spec.source)
        results = self.both(
            lambda: self.catalog.register_version(spec, version, replace=replace),
            lambda: self.model.register_version(spec, version, replace=replace),
        )
        assert results is None or results[0] == results[1]

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        there = [(a, record.number) for a, known in self.model.adapters.items() for record in known.versions]
        name, number = data.draw(st.sampled_from((*there, ("a", 1), ("b", 7))))
        self.both(lambda: self.catalog.retire(name, number), lambda: self.model.retire(name, number))

    @rule(name=any_names, data=st.data(), times=st.integers(1, 2))
    def set_alias(self, name: str, data: st.DataObject, times: int) -> None:
        """To versions that are there, most of the time."""
        there = [f"{a}@v{record.number}" for a, known in self.model.adapters.items() for record in known.versions]
        own = [version.partition("@")[2] for version in there if version.startswith(f"{name}@")]
        texts = st.sampled_from((*there, *there, *own, *own, f"a@{DIGESTS[0]}", f"b@{DIGESTS[2][:19]}", "v3"))
        weights = data.draw(st.dictionaries(texts, st.integers(0, 3), min_size=1, max_size=2))
        for _ in range(times):
            self.both(lambda: self.catalog.set_alias(name, weights), lambda: self.model.set_alias(name, weights))

    @rule(name=any_names, weights=any_weights)
    def set_alias_late(self, name: str, weights: dict[str, int]) -> None:
        """With a revision that is not the name's any more: nothing happens."""
        before = self.catalog.revision()
        with pytest.raises(AdapterConflict):
            self.catalog.set_alias(name, weights, expected=before + 1)
        assert self.catalog.revision() == before

    @rule(data=st.data(), times=st.integers(1, 3))
    def rollback(self, data: st.DataObject, times: int) -> None:
        changed = [name for name, known in self.model.names.items() if known.history]
        name = data.draw(st.sampled_from((*changed, *changed, *NAMES, *ALIASES)))
        for _ in range(times):
            self.both(lambda: self.catalog.rollback(name), lambda: self.model.rollback(name))

    @rule(name=any_names)
    def remove_alias(self, name: str) -> None:
        self.both(lambda: self.catalog.remove_alias(name), lambda: self.model.remove_alias(name))

    # -- memory --------------------------------------------------------------------------------------------------

    @rule(wanted=st.sets(st.sampled_from(ADDRESSES), max_size=6))
    def fetch(self, wanted: set[str]) -> None:
        missing = self.routes.missing(wanted)
        if missing:
            self.routes.fetch(missing)
        assert not self.routes.missing(wanted)

    @rule()
    def follow(self) -> None:
        self.routes.follow()
        self.since_followed.clear()

    # -- what holds after every step -----------------------------------------------------------------------------

    @invariant()
    def the_catalog_shows_what_the_model_does(self) -> None:
        type(self).steps += 1
        model, catalog = self.model, self.catalog
        registered = {r.spec.name: r for r in catalog.registrations()}
        assert registered == {name: adapter.registration for name, adapter in model.adapters.items()}
        assert list(registered) == sorted(registered)
        aliases = catalog.aliases()
        assert [alias.name for alias in aliases] == sorted(model.names)
        assert all(alias == alias_of(model, alias.name, alias) for alias in aliases)
        assert set(catalog.unfinished()) == model.unfinished()

    @invariant()
    def other_views_agree(self) -> None:
        """One of them after each step: they take as long as all the rest."""
        model, catalog, turn = self.model, self.catalog, type(self).steps
        if turn % 3 == 0:
            assert catalog.num_registered() == len(model.adapters)
            counted = {base: total for base, total in catalog.totals().items() if total.versions}
            assert counted == model.totals()
        elif turn % 3 == 1:
            name = NAMES[turn // 3 % len(NAMES)]
            assert name not in model.adapters or catalog.versions(name) == model.adapters[name].versions
        else:
            base = BASES[turn // 3 % len(BASES)]
            wanted = {version.digest: pinned for version, pinned in catalog.preloaded(base)}
            assert wanted == model.preloaded(base)

    @invariant()
    def every_address_means_what_it_should_and_whoever_follows_is_told(self) -> None:
        routes = self.catalog.routes(ADDRESSES)
        meanings: dict[str, Meaning] = {address: self.model.meaning(address) for address in ADDRESSES}
        assert {a: (routes[a].choices, routes[a].registration) if a in routes else None for a in ADDRESSES} == meanings
        changes = self.catalog.changes(self.revision)
        assert changes is not None and changes[0] >= self.revision
        changed = {address.partition("@")[0] for address in ADDRESSES if meanings[address] != self.seen[address]}
        assert changed <= changes[1], "a change that nobody is told of"
        events = self.catalog.events(after=self.revision, limit=10_000)
        assert [event.revision for event in events] == [*range(self.revision + 1, changes[0] + 1)]
        self.revision, self.seen = changes[0], meanings
        self.since_followed.append(meanings)

    @invariant()
    def memory_is_never_older_than_what_it_followed(self) -> None:
        known = [address for address in ADDRESSES if not self.routes.missing([address])]
        assert len(self.routes) <= CAPACITY
        for address in known:
            found = self.routes.find(address, None, "key")
            possible = set().union(*(outcome(meanings[address]) for meanings in self.since_followed))
            assert (type(found) if isinstance(found, AdapterRouterError) else found) in possible, address


def _of(version: AdapterVersion, name: str, source: Source | None = None) -> AdapterVersion:
    return replace(version, adapter=name, source=source or version.source)


def _run(open_catalog: Callable[[Callable[[], float]], Catalog], examples: int, steps: int) -> type[CatalogMachine]:
    machine = type("Machine", (CatalogMachine,), {"open": staticmethod(open_catalog)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),  # to shrink takes longer than a test may
            database=None,
        ),
    )
    return machine


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of transactions wait for no disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.mark.timeout(900)  # a minute of a processor of its own
def test_on_sqlite(memory: Path) -> None:
    template = memory / "template" / "catalog.db"
    Catalog(f"sqlite:///{template}").close()
    count = 0

    def open_catalog(now: Callable[[], float]) -> Catalog:
        nonlocal count
        count += 1
        shutil.rmtree(memory / str(count - 1), ignore_errors=True)
        directory = memory / str(count)
        shutil.copytree(template.parent, directory)
        return Catalog(f"sqlite:///{directory}/catalog.db", now=now)

    machine = _run(open_catalog, examples=260, steps=50)
    assert machine.steps >= 10_000 and machine.refusals > 1000


def test_on_postgresql(postgres: PostgreSQL) -> None:
    url = postgres.new_database()
    Catalog(url).close()

    def open_catalog(now: Callable[[], float]) -> Catalog:
        database = Database(url)
        with database.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                if table.name != "clock":
                    connection.execute(delete(table))
            connection.execute(text("UPDATE clock SET revision = 0, num_adapters = 0"))
        database.close()
        return Catalog(url, now=now)

    machine = _run(open_catalog, examples=12, steps=50)
    assert machine.steps >= 500
