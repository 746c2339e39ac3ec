"""What the catalog's methods cost with 10,000 registered adapters: counted, and compared with 500."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Table, event, insert, select, text, update

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.tables import adapters, aliases, clock, events, targets, versions
from adapter_router.errors import AdapterNotFound
from tests.catalogs import BASE, digest, spec, version
from tests.postgres import PostgreSQL

_FEW, _MANY = 500, 10_000
_PAGE = 20

Work = Callable[[Catalog], object]
METHODS: dict[str, Work] = {
    "register": lambda c: c.register(spec("new")),
    "register with a version": lambda c: c.register_version(spec("newer"), version("newer", 1)),
    "register again": lambda c: c.register(spec("n-00050", "/other"), replace=True),
    "check_name": lambda c: c.check_name("free"),
    "registration": lambda c: c.registration("n-00050"),
    "an unknown name": lambda c: _raises(lambda: c.registration("n-00050x")),
    "registrations": lambda c: c.registrations(after="n-00049", limit=_PAGE),
    "registrations in a phase": lambda c: c.registrations(limit=_PAGE, phase="Registered"),
    "registrations in a rare phase": lambda c: c.registrations(limit=_PAGE, phase="Retired"),
    "num_registered": lambda c: c.num_registered(),
    "set_phase": lambda c: c.set_phase("n-00051", "Fetching"),
    "pin": lambda c: c.pin("n-00052", True),
    "claim": lambda c: c.claim("n-00053", "me", 5),
    "release": lambda c: c.release("n-00053", "me"),
    "unfinished": lambda c: c.unfinished(_PAGE),
    "add_version": lambda c: c.add_version("n-00054", version("n-00054", 77)),
    "versions": lambda c: c.versions("n-00055"),
    "set_alias": lambda c: c.set_alias("n-00054", {"v1": 9, "v2": 1}),
    "set_alias anew": lambda c: c.set_alias("prod", {"n-00054@v1": 9, f"n-00055@{digest(55)}": 1}),
    "add_version again": lambda c: c.add_version("n-00059", version("n-00059", 78)),
    "rollback": lambda c: c.rollback("n-00054"),
    "retire": lambda c: c.retire("n-00059", 1),
    "alias": lambda c: c.alias("n-00056"),
    "aliases": lambda c: c.aliases(after="n-00049", limit=_PAGE),
    "remove_alias": lambda c: c.remove_alias("prod"),
    "holds": lambda c: (c.holds(digest(57)), c.holds(digest(10**9))),
    "remove": lambda c: c.remove("n-00058"),
    "events": lambda c: c.events(after=50, limit=_PAGE),
    "events of a name": lambda c: c.events("n-00060", limit=_PAGE),
    "revision": lambda c: c.revision(),
    "changes": lambda c: c.changes(c.revision() - 10),
    "routes": lambda c: c.routes([f"n-{number:05}" for number in range(60, 60 + _PAGE)]),
    "routes of versions": lambda c: c.routes([f"n-{n:05}@{v}" for n in range(60, 70) for v in ("v1", digest(n))]),
    "routes of nothing": lambda c: c.routes_at(["n-0", "nobody", "n-00061@v7"]),
    "preloaded": lambda c: c.preloaded(BASE),
    "a router's row": lambda c: _row(Routes(c)),
}


def _raises(work: Callable[[], object]) -> None:
    with pytest.raises(AdapterNotFound):
        work()


def _row(routes: Routes) -> None:
    routes.fetch(routes.missing(["n-00062"]))
    routes.follow()
    routes.find("n-00062")


def fill(url: str, number: int) -> Catalog:
    """A catalog of ``number`` adapters, 10 of them pinned: copies of one that was registered as all are."""
    catalog = Catalog(url)
    catalog.register_version(spec("n-00000"), version("n-00000", 0))
    with catalog._database.engine.execution_options(writing=True).begin() as connection:

        def copies(table: Table, values: Callable[[int], dict[str, Any]]) -> None:
            first = dict(connection.execute(select(table).limit(1)).one()._mapping)
            connection.execute(insert(table), [{**first, **values(n)} for n in range(1, number)])

        def name(n: int) -> str:
            return f"n-{n:05}"

        def waiting(n: int) -> dict[str, Any]:
            pinned = n % (number // 10) == 0
            phase = {"phase": "Registered", "due": 5.0} if n % 2 else {}
            return {"id": 3 + n, "name": name(n), "pinned": pinned, "wanted": pinned, **phase}

        copies(adapters, waiting)
        copies(aliases, lambda n: {"name": name(n), "adapter_id": 3 + n})
        copies(versions, lambda n: {"id": 3 + n, "adapter_id": 3 + n, "digest": digest(n), "identity": str(n)})
        copies(targets, lambda n: {"alias": name(n), "version_id": 3 + n})
        revision = connection.execute(select(clock.c.revision)).scalar_one()
        copies(events, lambda n: {"revision": revision + n, "name": name(n)})
        connection.execute(update(clock).values(revision=revision + number - 1, num_adapters=number))
    return catalog


class Meter:
    """Counts what an engine is asked for: statements, and steps of SQLite's virtual machine."""

    def __init__(self, engine: Engine) -> None:
        self.statements: list[tuple[str, Any]] = []
        self.steps = 0
        engine.dispose()
        event.listen(engine, "before_cursor_execute", self._statement)
        if engine.name == "sqlite":
            event.listen(engine, "connect", lambda connection, _: connection.set_progress_handler(self._step, 1))

    def _statement(self, _: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        self.statements.append((statement, parameters))

    def _step(self) -> int:
        self.steps += 1
        return 0

    def measure(self, work: Work, catalog: Catalog) -> tuple[int, int]:
        self.statements.clear()
        self.steps = 0
        work(catalog)
        return len(self.statements), self.steps


def test_no_method_costs_more_for_more_adapters(tmp_path: Path) -> None:
    """Statements are as many, and the database's own work grows as the depth of an index does, if at all."""
    catalogs = [fill(f"sqlite:///{tmp_path}/{number}/catalog.db", number) for number in (_FEW, _MANY)]
    meters = [Meter(catalog._database.engine) for catalog in catalogs]
    report = {}
    for name, work in METHODS.items():
        few, many = (meter.measure(work, catalog) for meter, catalog in zip(meters, catalogs, strict=True))
        report[name] = (few, many)
        assert few[0] == many[0] <= 30, name
        assert many[1] <= 1.2 * few[1] + 50, (name, few, many)
    assert catalogs[1].num_registered() > _MANY - 5
    pages = [report[name][1] for name in ("registrations", "aliases", "routes")]
    assert all(statements <= 4 and steps < 100 * _PAGE for statements, steps in pages)
    for catalog in catalogs:
        catalog.close()


@pytest.fixture
def many_on_postgresql(postgres: PostgreSQL) -> Iterator[Catalog]:
    catalog = fill(postgres.new_database(), _MANY)
    with catalog._database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    yield catalog
    catalog.close()


def test_postgresql_reads_no_table_or_index_from_end_to_end(many_on_postgresql: Catalog) -> None:
    catalog = many_on_postgresql
    meter = Meter(catalog._database.engine)
    explained = 0
    for name, work in METHODS.items():
        meter.measure(work, catalog)
        for statement, parameters in list(meter.statements):
            if statement.startswith(("SELECT", "UPDATE", "DELETE")):
                explained += 1
                assert _most_read(catalog, statement, parameters) <= 10 * _PAGE, (name, statement)
    assert explained > 100


def _most_read(catalog: Catalog, statement: str, parameters: Any) -> int:
    """Rows that one step of the statement reads, also those that it drops."""
    with catalog._database.engine.connect() as connection:
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
        plan = connection.exec_driver_sql(explain, parameters).scalar_one()
        connection.rollback()
    nodes = [entry["Plan"] for entry in plan]
    most = 0
    while nodes:
        node = nodes.pop()
        read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        most = max(most, read * node["Actual Loops"])
        nodes += node.get("Plans", [])
    return int(most)


def test_a_row_of_a_known_adapter_asks_the_database_for_nothing(tmp_path: Path) -> None:
    catalog = fill(f"sqlite:///{tmp_path}/catalog.db", _FEW)
    routes = Routes(catalog)
    names = [f"n-{number:05}" for number in range(_FEW)]
    meter = Meter(catalog._database.engine)
    fetched, _ = meter.measure(lambda _: routes.fetch(names), catalog)
    idle, _ = meter.measure(lambda _: routes.follow(), catalog)
    found, _ = meter.measure(lambda _: [routes.find(n) for n in names if not routes.missing([n])], catalog)
    assert (fetched, idle, found) == (4, 2, 0), "BEGIN among them"
    for name in names[:30]:
        catalog.pin(name, True)
    followed, _ = meter.measure(lambda _: routes.follow(), catalog)
    assert followed <= 9, "however many have changed"
    catalog.close()
