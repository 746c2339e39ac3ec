"""An adapter's versions: what was found at its source and can be served, numbered from 1."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from adapter_router.catalog.aliases import lead
from adapter_router.catalog.database import Writing
from adapter_router.catalog.encoding import identity, version_of, version_text
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import AdapterSpec, Registration, VersionRecord
from adapter_router.catalog.registrations import amend, check_current, enter, existing
from adapter_router.catalog.tables import targets, versions
from adapter_router.catalog.totals import counted
from adapter_router.errors import AdapterNotFound, InvalidRequest
from adapter_router.types import AdapterVersion


class Versions(Part):
    """The catalog's methods about versions."""

    def add_version(
        self, name: str, version: AdapterVersion, *, activate: bool | None = True, of: Registration | None = None
    ) -> VersionRecord:
        """Note a version that can be served: the adapter is Ready. Its name means this one alone if ``activate``.

        The same content for the same base, with the same task and labels, is the same version; one that was retired is
        back. ``activate`` None: if it was not known before; what was retired stays so. Raises AdapterNotFound;
        AdapterConflict when the adapter's source is not ``version.source`` any more, or ``of``, what the version was
        found for, has been superseded.
        """
        with self._database.writing() as writing:
            row = existing(writing.connection, name)
            check_current(row, version, of)
            return _add(writing, row, version, activate)

    def register_version(self, spec: AdapterSpec, version: AdapterVersion, *, replace: bool = False) -> VersionRecord:
        """Register an adapter with a version that can be served, as one change. Raises what ``register`` does."""
        with self._database.writing() as writing:
            row = enter(writing, spec, replace=replace)
            check_current(row, version, None)
            return _add(writing, row, version, True)

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of an adapter, oldest first, retired ones too. Raises AdapterNotFound."""
        with self._database.reading() as connection:
            row = existing(connection, name)
            query = select(versions).where(versions.c.adapter_id == row.id).order_by(versions.c.number)
            return [_record(name, each) for each in connection.execute(query)]

    def retire(self, name: str, number: int) -> VersionRecord:
        """Take a version back: nobody can ask for it any more.

        Raises AdapterNotFound; InvalidRequest while a name leads to it, if only with weight 0.
        """
        with self._database.writing() as writing:
            connection = writing.connection
            row = existing(connection, name)
            found = connection.execute(
                select(versions).where(versions.c.adapter_id == row.id, versions.c.number == number)
            ).one_or_none()
            if found is None:
                raise AdapterNotFound(f"adapter {name!r} has no version v{number}", "version")
            if found.retired is not None:
                return _record(name, found)
            _check_unused(connection, f"{name}@v{number}", found.id)
            with counted(writing, row.id):
                connection.execute(update(versions).where(versions.c.id == found.id).values(retired=writing.now))
            writing.record(name, "retired", {"number": number, "digest": found.digest})
            return _record(name, found, retired=writing.now)

    def holds(self, digest: str) -> bool:
        """Whether any adapter has an unretired version of this content."""
        query = select(versions.c.id).where(versions.c.digest == digest, versions.c.retired.is_(None)).limit(1)
        with self._database.reading() as connection:
            return connection.execute(query).one_or_none() is not None


def _add(writing: Writing, row: Row[Any], version: AdapterVersion, activate: bool | None) -> VersionRecord:
    connection = writing.connection
    same = versions.c.identity == identity(version)
    known = connection.execute(select(versions).where(versions.c.adapter_id == row.id, same)).one_or_none()
    if known and known.retired is not None and activate is None:
        return _record(row.name, known)
    number = known.number if known else row.newest + 1
    ready = {"phase": "Ready", "attempts": 0, "failure": None, "retry_at": None}
    detail = {"phase": "Ready", "number": number, "digest": version.digest}
    row = amend(writing, row, "version", detail, newest=max(number, row.newest), **ready)
    # Where it was found last is where it will be looked for.
    found = {"body": version_text(version), "num_bytes": version.num_bytes, "retired": None}
    with counted(writing, row.id):
        if known:
            connection.execute(update(versions).where(versions.c.id == known.id).values(found))
        else:
            values = {"id": writing.revision, "adapter_id": row.id, "number": number, "identity": identity(version)}
            values |= {"digest": version.digest, "base": version.base, "created": writing.now, **found}
            connection.execute(insert(versions).values(values))
    added = connection.execute(select(versions).where(versions.c.adapter_id == row.id, same)).one()
    if activate or (activate is None and not known):
        lead(writing, row.name, {added.id: 1}, "alias")
    return _record(row.name, added)


def _record(adapter: str, row: Row[Any], retired: float | None = None) -> VersionRecord:
    version = version_of(adapter, row.digest, row.body)
    return VersionRecord(row.number, version, row.created, row.retired if retired is None else retired)


def _check_unused(connection: Connection, shown: str, version_id: int) -> None:
    leading = connection.execute(select(targets.c.alias).where(targets.c.version_id == version_id).limit(1)).scalar()
    if leading is not None:
        raise InvalidRequest(f"{shown} cannot be retired: {leading!r} leads to it", "version")
