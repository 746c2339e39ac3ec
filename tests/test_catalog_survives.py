"""The catalog between processes: they write at once, and are killed in the middle of it."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select, text

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import Alias
from adapter_router.catalog.tables import adapters, aliases, clock, events
from adapter_router.errors import AdapterConflict, AdapterNotFound, CatalogUnavailable
from tests.catalogs import spec, version
from tests.postgres import PostgreSQL, start_postgres

_SPAWN = multiprocessing.get_context("spawn")
_WRITERS = 4
_ROUNDS = 25


def together(target: Callable[..., None], count: int, *args: Any) -> list[Any]:
    """Run ``target(connection, number, *args)`` in ``count`` processes at once; what each sends back at its end."""
    pipes = [_SPAWN.Pipe() for _ in range(count)]
    processes = [_SPAWN.Process(target=target, args=(pipes[n][1], n, *args)) for n in range(count)]
    for process in processes:
        process.start()
    for here, there in pipes:
        there.close()
        assert here.recv() == "ready"
    for here, _ in pipes:
        here.send("go")
    results = [here.recv() for here, _ in pipes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return results


def _begin(pipe: Connection) -> None:
    pipe.send("ready")
    assert pipe.recv() == "go"


def assert_whole(url: str) -> None:
    """What the catalog shows is what its events tell, and every part of it fits the others."""
    engine = create_engine(url)
    with engine.connect() as connection:
        last, number = connection.execute(select(clock.c.revision, clock.c.num_adapters)).one()
        told = list(connection.execute(select(events).order_by(events.c.revision)))
        assert [row.revision for row in told] == [*range(1, last + 1)]
        registered: dict[str, str] = {}
        meant: dict[str, Any] = {}
        for row in told:
            if row.kind == "registered":
                registered[row.name] = "Registered"
            elif row.kind in ("version", "phase"):
                registered[row.name] = json.loads(row.detail)["phase"]
            elif row.kind in ("alias", "rollback"):
                meant[row.name] = json.loads(row.detail)
            elif row.kind in ("removed", "alias-removed"):
                registered.pop(row.name, None)
                meant.pop(row.name, None)
        assert dict(connection.execute(select(adapters.c.name, adapters.c.phase)).all()) == registered
        assert connection.execute(select(func.count()).select_from(aliases)).scalar() == len(registered.keys() | meant)
        assert number == len(registered)
        if engine.name == "sqlite":
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    engine.dispose()
    catalog = Catalog(url)
    for name, shares in meant.items():
        assert {f"{t.adapter}@v{t.number}": t.weight for t in catalog.alias(name).targets} == shares
    for name, phase in registered.items():
        assert phase != "Ready" or catalog.versions(name)
    catalog.close()


# -- at once -----------------------------------------------------------------------------------------------------


def _start(pipe: Connection, number: int, url: str) -> None:
    _begin(pipe)
    catalog = Catalog(url)
    catalog.register(spec(f"of-{number}"))
    catalog.close()
    pipe.send("done")


def test_processes_that_start_at_once_make_one_schema(catalog_url: str) -> None:
    together(_start, 5, catalog_url)
    catalog = Catalog(catalog_url)
    assert [r.spec.name for r in catalog.registrations()] == [f"of-{number}" for number in range(5)]
    catalog.close()
    assert_whole(catalog_url)


def test_sqlites_journal_is_set_up_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Whoever finds another at it waits: SQLite itself would answer some of them that the file is locked."""
    path = tmp_path / "catalog.db"
    opened: list[Catalog] = []
    thread = threading.Thread(target=lambda: opened.append(Catalog(f"sqlite:///{path}")))
    with (tmp_path / "catalog.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        _wait(path.exists)
        thread.join(0.5)
        assert thread.is_alive() and path.stat().st_size == 0
    thread.join(60)
    assert opened[0].revision() == 0
    opened[0].close()


def _count(pipe: Connection, _: int, url: str) -> None:
    catalog = Catalog(url)
    _begin(pipe)
    conflicts = 0
    for _ in range(_ROUNDS):
        while True:
            now = catalog.alias("counter")
            try:
                catalog.set_alias("counter", {"food@v1": now.targets[0].weight + 1}, expected=now.revision)
                break
            except AdapterConflict:
                conflicts += 1
    catalog.close()
    pipe.send(conflicts)


def test_no_change_is_lost_between_processes(catalog_url: str) -> None:
    """Everybody adds one to a weight, over and over, and expects what was read to be still so."""
    catalog = Catalog(catalog_url)
    catalog.register_version(spec("food"), version("food", 1))
    catalog.set_alias("counter", {"food@v1": 1})
    conflicts = together(_count, _WRITERS, catalog_url)
    assert catalog.alias("counter").targets[0].weight == 1 + _WRITERS * _ROUNDS
    assert sum(conflicts) > 0, "nobody was in anybody's way: this proved nothing"
    catalog.close()
    assert_whole(catalog_url)


def _flip(pipe: Connection, number: int, url: str) -> None:
    catalog = Catalog(url)
    _begin(pipe)
    seen = []
    for turn in range(_ROUNDS):
        seen.append(catalog.set_alias("food", {f"v{1 + turn % 3}": 1 + turn + 100 * number}))
        if turn % 5 == 4:
            seen.append(catalog.rollback("food"))
    catalog.close()
    pipe.send(seen)


def test_flips_of_many_processes_have_one_order(catalog_url: str) -> None:
    """Each one's answer is what the log says of its revision, and nobody's revisions go back."""
    catalog = Catalog(catalog_url)
    catalog.register(spec("food"))
    for number in (1, 2, 3):
        catalog.add_version("food", version("food", number))
    answers: list[list[Alias]] = together(_flip, _WRITERS, catalog_url)
    told = {event.revision: json.loads(event.detail) for event in catalog.events("food", limit=1000)}
    for seen in answers:
        revisions = [alias.revision for alias in seen]
        assert revisions == sorted(revisions)
        for alias in seen:
            assert {f"{t.adapter}@v{t.number}": t.weight for t in alias.targets} == told[alias.revision]
    assert len({alias.revision for seen in answers for alias in seen}) == _WRITERS * _ROUNDS * 6 // 5
    catalog.close()
    assert_whole(catalog_url)


def test_a_reader_never_sees_half_a_change(catalog_url: str) -> None:
    """An adapter comes, with its version, and goes, all at once: it is Ready and means something, or is not there."""
    catalog = Catalog(catalog_url)
    done = threading.Event()
    seen = set()
    problems: list[object] = []

    def read() -> None:
        while not done.is_set():
            route = catalog.routes(["food"]).get("food")
            seen.add(route is None)
            if route is not None and (not route.choices or route.registration is None):
                problems.append(route)
            if route is not None and route.registration is not None and route.registration.phase != "Ready":
                problems.append(route.registration)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        deadline = time.monotonic() + 60
        while (len(seen) < 2 or catalog.revision() < 300) and time.monotonic() < deadline:
            catalog.register_version(spec("food"), version("food", 1))
            catalog.remove("food")
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert problems == [] and seen == {True, False}
    catalog.close()


# -- killed ------------------------------------------------------------------------------------------------------


def _write(pipe: Connection, number: int, url: str) -> None:
    """Write and tell of every write that was acknowledged, until the end."""
    catalog = Catalog(url)
    _begin(pipe)
    turn = 0
    while True:
        turn += 1
        name = f"{number}-{turn}"
        catalog.register_version(spec(name), version(name, turn))
        pipe.send(("there", name))
        catalog.set_alias(f"alias-{name}", {f"{name}@v1": 1})
        catalog.add_version(name, version(name, turn + 1))
        catalog.remove_alias(f"alias-{name}")
        if turn % 2:
            catalog.remove(name)
            pipe.send(("gone", name))


def _killed(url: str, number: int, writes: int) -> dict[str, str]:
    """Let a process write, and kill it somewhere in the middle; what it was told is done, by name."""
    here, there = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_write, args=(there, number, url))
    process.start()
    there.close()
    told: dict[str, str] = {}
    assert here.recv() == "ready"
    here.send("go")
    for _ in range(writes):
        state, name = here.recv()
        told[name] = state
    time.sleep(random.uniform(0, 0.02))  # anywhere in a write
    process.kill()
    process.join()
    try:
        while here.poll():
            state, name = here.recv()
            told[name] = state
    except (EOFError, OSError):
        pass
    return told


def test_killed_in_the_middle_of_writing(catalog_url: str) -> None:
    Catalog(catalog_url).close()
    told: dict[str, str] = {}
    for number in range(6):
        told |= _killed(catalog_url, number, 3 + number)
        assert_whole(catalog_url)
    catalog = Catalog(catalog_url)
    maybe = 0
    for name, state in told.items():
        try:
            assert catalog.registration(name).phase == "Ready"
            maybe += state == "gone"
        except AdapterNotFound:
            # Removed before its process could tell of it, or it would have been told so.
            assert state == "gone" or int(name.partition("-")[2]) % 2, name
    assert maybe == 0, "what was said to be removed is there"
    catalog.register(spec("and it goes on"))
    catalog.close()


@pytest.fixture
def mortal() -> Iterator[PostgreSQL]:
    """A server that may be killed."""
    server = start_postgres()
    yield server
    server.close()


def test_postgresql_is_killed_and_comes_back(mortal: PostgreSQL) -> None:
    url = mortal.new_database()
    catalog, idle = Catalog(url), Catalog(url)
    written: list[str] = []
    failed = threading.Event()
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            name = f"n-{len(written)}"
            try:
                catalog.register_version(spec(name), version(name, 1), replace=True)
                written.append(name)
            except CatalogUnavailable:
                failed.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2):
            before = len(written)
            assert idle.revision() >= 0
            failed.clear()
            _wait(lambda: len(written) > before + 5)  # noqa: B023 - called at once
            mortal.kill()
            assert failed.wait(30), "nobody noticed"
            mortal.start()
            assert idle.revision() >= before, "it has not heard of the death, and finds out by itself"
            after = len(written)
            _wait(lambda: len(written) > after)  # noqa: B023
    finally:
        done.set()
        writer.join()
    assert {r.spec.name for r in catalog.registrations(limit=100_000)} >= set(written)
    catalog.close()
    idle.close()
    assert_whole(url)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
