"""What names mean: versions, in shares. Every change is one step, and can be undone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from adapter_router.catalog.addressing import name_problem
from adapter_router.catalog.close_names import nothing_named
from adapter_router.catalog.database import Writing
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import Alias, Target
from adapter_router.catalog.tables import adapters, aliases, history, targets, versions
from adapter_router.catalog.weights import resolved
from adapter_router.errors import AdapterConflict, InvalidRequest

_REMEMBERED = 100  # changes of one name that can be undone


class Aliases(Part):
    """The catalog's methods about aliases."""

    def set_alias(self, name: str, weights: Mapping[str, int], *, expected: int | None = None) -> Alias:
        """Let ``name``, an adapter's or a new one, mean versions in shares: ``{"v1": 90, "v2": 10}``.

        Versions are ``v2`` or ``sha256:…`` (12 digits of it are enough) of the adapter, ``food@v2`` of another.
        ``expected``: the revision of what is replaced, 0 for nothing; AdapterConflict when it is another. Raises
        InvalidRequest with every problem.
        """
        with self._database.writing() as writing:
            found = _find(writing.connection, name)
            _check_expected(name, found, expected)
            if problem := None if found is not None else name_problem(name):
                raise InvalidRequest(problem, "name")
            own = name if found is not None and found.adapter_id is not None else None
            meant = resolved(writing.connection, own, weights)
            if found is None:
                fresh = {"name": name, "adapter_id": None, "revision": 0, "updated": writing.now}
                writing.connection.execute(insert(aliases).values(fresh))
            lead(writing, name, meant, "alias")
            return _read(writing.connection, name)

    def rollback(self, name: str, *, expected: int | None = None) -> Alias:
        """Undo the last change of what ``name`` means; again, the one before. ``expected`` as in ``set_alias``.

        Raises AdapterNotFound; InvalidRequest when nothing is left to undo, or what was meant is gone.
        """
        with self._database.writing() as writing:
            connection = writing.connection
            _check_expected(name, _existing(connection, name), expected)
            last = connection.execute(
                select(history).where(history.c.alias == name).order_by(history.c.revision.desc()).limit(1)
            ).one_or_none()
            if last is None:
                raise InvalidRequest(f"{name!r} has meant nothing else before", "name")
            meant = dict(json.loads(last.targets))
            _check_there(connection, name, meant)
            connection.execute(delete(history).where(history.c.alias == name, history.c.revision == last.revision))
            _replace(writing, name, meant, "rollback")
            return _read(connection, name)

    def alias(self, name: str) -> Alias:
        """What ``name`` means, an adapter's own too. Raises AdapterNotFound."""
        with self._database.reading() as connection:
            return _read(connection, name)

    def aliases(self, after: str | None = None, limit: int = 100) -> list[Alias]:
        """At most ``limit`` names by name, adapters' own among them: those after ``after``."""
        page = select(aliases).order_by(aliases.c.name).limit(limit)
        if after is not None:
            page = page.where(aliases.c.name > after)
        with self._database.reading() as connection:
            rows = list(connection.execute(page))
            meant = _targets(connection, [row.name for row in rows])
            return [Alias(row.name, meant.get(row.name, ()), row.revision, row.updated) for row in rows]

    def remove_alias(self, name: str) -> None:
        """Forget an alias. Raises AdapterNotFound; InvalidRequest for an adapter's own name."""
        with self._database.writing() as writing:
            connection = writing.connection
            if _existing(connection, name).adapter_id is not None:
                raise InvalidRequest(f"{name!r} is an adapter's own name; it goes with the adapter", "name")
            connection.execute(delete(targets).where(targets.c.alias == name))
            connection.execute(delete(history).where(history.c.alias == name))
            connection.execute(delete(aliases).where(aliases.c.name == name))
            writing.record(name, "alias-removed", {})


def lead(writing: Writing, name: str, meant: Mapping[int, int], kind: str) -> None:
    """Let ``name`` mean ``meant``, weights by version id, and remember what it meant; nothing where it is the same."""
    before = _ids(writing.connection, name)
    if before == meant:
        return
    revision = _replace(writing, name, meant, kind)
    if not before:
        return
    connection = writing.connection
    state = {"alias": name, "revision": revision, "targets": json.dumps(sorted(before.items()))}
    connection.execute(insert(history).values(state))
    states = select(history.c.revision).where(history.c.alias == name).order_by(history.c.revision.desc())
    oldest = connection.execute(states.offset(_REMEMBERED).limit(1)).scalar()
    if oldest is not None:
        connection.execute(delete(history).where(history.c.alias == name, history.c.revision <= oldest))


def _replace(writing: Writing, name: str, meant: Mapping[int, int], kind: str) -> int:
    connection = writing.connection
    connection.execute(delete(targets).where(targets.c.alias == name))
    rows = [{"alias": name, "version_id": version, "weight": weight} for version, weight in meant.items()]
    connection.execute(insert(targets), rows)
    shown = {f"{t.adapter}@v{t.number}": t.weight for t in _targets(connection, [name])[name]}
    revision = writing.record(name, kind, shown)
    values = {"revision": revision, "updated": writing.now}
    connection.execute(update(aliases).where(aliases.c.name == name).values(values))
    return revision


def _find(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(aliases).where(aliases.c.name == name)).one_or_none()


def _existing(connection: Connection, name: str) -> Row[Any]:
    found = _find(connection, name)
    if found is None:
        raise nothing_named(connection, name)
    return found


def _read(connection: Connection, name: str) -> Alias:
    row = _existing(connection, name)
    return Alias(name, _targets(connection, [name]).get(name, ()), row.revision, row.updated)


def _targets(connection: Connection, names: list[str]) -> dict[str, tuple[Target, ...]]:
    query = (
        select(targets.c.alias, targets.c.weight, versions.c.number, adapters.c.name)
        .join(versions, versions.c.id == targets.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(targets.c.alias.in_(names))
        .order_by(adapters.c.name, versions.c.number)
    )
    found: dict[str, tuple[Target, ...]] = {}
    for row in connection.execute(query):
        found[row.alias] = (*found.get(row.alias, ()), Target(row.name, row.number, row.weight))
    return found


def _ids(connection: Connection, name: str) -> dict[int, int]:
    query = select(targets.c.version_id, targets.c.weight).where(targets.c.alias == name)
    return {row.version_id: row.weight for row in connection.execute(query)}


def _check_expected(name: str, found: Row[Any] | None, expected: int | None) -> None:
    revision = 0 if found is None else found.revision
    if expected is not None and expected != revision:
        raise AdapterConflict(f"{name!r} is at revision {revision}, not {expected}: somebody was faster", "expected")


def _check_there(connection: Connection, name: str, meant: Mapping[int, int]) -> None:
    query = (
        select(versions.c.id, versions.c.number, versions.c.retired, adapters.c.name)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(versions.c.id.in_(list(meant)))
    )
    rows = list(connection.execute(query))
    problems = [f"{row.name}@v{row.number} was retired" for row in rows if row.retired is not None]
    if missing := len(meant) - len(rows):
        problems.append(f"{missing} of the versions it meant went with their adapters")
    if problems:
        raise InvalidRequest(f"{name!r} cannot be rolled back: {'; '.join(problems)}", "name", problems)
