"""Adapters the catalog knows: what was declared, and how far each has come."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from adapter_router.catalog.addressing import name_problem
from adapter_router.catalog.close_names import nothing_named
from adapter_router.catalog.database import Writing
from adapter_router.catalog.encoding import failure_text, registration_of, spec_text, version_of
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import AdapterSpec, Phase, Registration
from adapter_router.catalog.tables import adapters, aliases, clock, history, targets, versions
from adapter_router.catalog.totals import counted
from adapter_router.errors import AdapterConflict, AdapterExists, AdapterRouterError, InvalidRequest
from adapter_router.types import AdapterVersion

_UNDER_WAY = ("Registered", "Fetching", "Validating")


class Registrations(Part):
    """The catalog's methods about registrations."""

    def check_name(self, name: str, *, replace: bool = False) -> None:
        """Raise what ``register`` would, without writing."""
        with self._database.reading() as connection:
            _check(connection, name, replace)

    def register(self, spec: AdapterSpec, *, replace: bool = False, managed: bool = False) -> Registration:
        """Note an adapter. With ``replace`` an existing one begins anew, and means what it did until it is Ready.

        Raises InvalidRequest for what cannot be a name and for an alias', AdapterExists unless ``replace``.
        """
        with self._database.writing() as writing:
            return registration_of(enter(writing, spec, replace=replace, managed=managed))

    def registration(self, name: str) -> Registration:
        """The adapter ``name``. Raises AdapterNotFound, which suggests similar names."""
        with self._database.reading() as connection:
            return registration_of(existing(connection, name))

    def registrations(
        self, after: str | None = None, limit: int = 100, phase: Phase | None = None
    ) -> list[Registration]:
        """At most ``limit`` adapters by name: those after the name ``after``, and in ``phase`` if one is given."""
        query = select(adapters).order_by(adapters.c.name).limit(limit)
        if after is not None:
            query = query.where(adapters.c.name > after)
        if phase is not None:
            query = query.where(adapters.c.phase == phase)
        with self._database.reading() as connection:
            return [registration_of(row) for row in connection.execute(query)]

    def managed(self, after: str | None = None, limit: int = 1000) -> list[Registration]:
        """As ``registrations``: those that a manifest declares."""
        query = select(adapters).where(adapters.c.managed.is_(True)).order_by(adapters.c.name).limit(limit)
        if after is not None:
            query = query.where(adapters.c.name > after)
        with self._database.reading() as connection:
            return [registration_of(row) for row in connection.execute(query)]

    def num_registered(self) -> int:
        """How many adapters there are."""
        with self._database.reading() as connection:
            number: int = connection.execute(select(clock.c.num_adapters)).scalar_one()
            return number

    def remove(self, name: str) -> list[AdapterVersion]:
        """Forget an adapter, its versions and its own name's meaning; returns the versions, oldest first.

        Raises AdapterNotFound; InvalidRequest while another name leads to one of the versions.
        """
        with self._database.writing() as writing:
            return strike(writing, name)

    def set_phase(
        self,
        name: str,
        phase: Phase,
        error: AdapterRouterError | None = None,
        retry_at: float | None = None,
        attempts: int | None = None,
        *,
        of: Registration | None = None,
    ) -> Registration:
        """Note how far an adapter has come; ``error``, ``retry_at`` (seconds since the epoch): why it is Failed.

        ``attempts``: how many there were, if that has changed. The last failure is remembered until the adapter is
        Ready or begins anew. ``of``: what this is news of; nothing is noted when that has been superseded.
        Raises AdapterNotFound.
        """
        with self._database.writing() as writing:
            row = existing(writing.connection, name)
            if is_superseded(row, of):
                return registration_of(row)
            changes: dict[str, Any] = {"phase": phase, "retry_at": retry_at}
            if phase not in ("Fetching", "Validating"):
                changes["failure"] = failure_text(error)
            if attempts is not None:
                changes["attempts"] = attempts
            detail = {"phase": phase, **({"reason": error.message} if error else {})}
            return registration_of(amend(writing, row, "phase", detail, **changes))

    def pin(self, name: str, pinned: bool) -> Registration:
        """Keep an adapter on all devices, or no longer. Raises AdapterNotFound."""
        return self._flag(name, "pinned", pinned)

    def preload(self, name: str, preload: bool) -> Registration:
        """Load an adapter before a replica is ready, or no longer. Raises AdapterNotFound."""
        return self._flag(name, "preload", preload)

    def _flag(self, name: str, flag: str, value: bool) -> Registration:
        with self._database.writing() as writing:
            row = existing(writing.connection, name)
            if getattr(row, flag) == value:
                return registration_of(row)
            return registration_of(amend(writing, row, flag, {flag: value}, **{flag: value}))


def existing(connection: Connection, name: str) -> Row[Any]:
    """The adapter ``name``. Raises AdapterNotFound."""
    row = connection.execute(select(adapters).where(adapters.c.name == name)).one_or_none()
    if row is None:
        raise nothing_named(connection, name)
    return row


def enter(writing: Writing, spec: AdapterSpec, *, replace: bool, managed: bool = False) -> Row[Any]:
    """Note ``spec``, as ``Registrations.register``."""
    found = _check(writing.connection, spec.name, replace)
    flags = {"pinned": spec.pinned, "preload": spec.preload, "lazy": spec.lazy}
    detail = {"uri": spec.source.uri, "revision": spec.source.revision, **flags}
    if found is not None:
        # The revision that ``amend`` will record.
        anew = {"phase": "Registered", "attempts": 0, "failure": None, "retry_at": None, "began": writing.revision + 1}
        managed = managed or bool(found.managed)
        return amend(writing, found, "replaced", detail, spec=spec_text(spec), managed=managed, **flags, **anew)
    revision = writing.record(spec.name, "registered", detail)
    writing.num_adapters += 1
    values = {
        "id": revision,
        "name": spec.name,
        "spec": spec_text(spec),
        **flags,
        "wanted": spec.pinned or spec.preload,
        "managed": managed,
        "phase": "Registered",
        "created": writing.now,
        "updated": writing.now,
        "due": None if spec.lazy else writing.now,
        "attempts": 0,
        "newest": 0,
        "began": revision,
    }
    writing.connection.execute(insert(adapters).values(values))
    own = {"name": spec.name, "adapter_id": revision, "revision": revision, "updated": writing.now}
    writing.connection.execute(insert(aliases).values(own))
    return existing(writing.connection, spec.name)


def adopt(writing: Writing, spec: AdapterSpec) -> Row[Any]:
    """Let a manifest manage an adapter whose files are those of ``spec``: only its flags are set."""
    flags = {"pinned": spec.pinned, "preload": spec.preload, "lazy": spec.lazy}
    return amend(writing, existing(writing.connection, spec.name), "declared", flags, managed=True, **flags)


def amend(writing: Writing, row: Row[Any], kind: str, detail: dict[str, Any], **changes: Any) -> Row[Any]:
    """Change columns of an adapter and what follows from them, and record why."""
    after: dict[str, Any] = {**row._mapping, **changes}
    changes |= {
        "updated": writing.now,
        "wanted": after["pinned"] or after["preload"],
        "due": due(after, writing.now),
    }
    writing.record(row.name, kind, detail)
    writing.connection.execute(update(adapters).where(adapters.c.id == row.id).values(changes))
    return existing(writing.connection, row.name)


def strike(writing: Writing, name: str) -> list[AdapterVersion]:
    """Forget an adapter, as ``Registrations.remove``."""
    connection = writing.connection
    row = existing(connection, name)
    if reason := why_it_stays(connection, name):
        raise InvalidRequest(f"{name!r} cannot be removed: {reason}", "name")
    of_it = select(versions).where(versions.c.adapter_id == row.id).order_by(versions.c.number)
    gone = [version_of(name, each.digest, each.body) for each in connection.execute(of_it)]
    connection.execute(delete(targets).where(targets.c.alias == name))
    connection.execute(delete(history).where(history.c.alias == name))
    connection.execute(delete(aliases).where(aliases.c.name == name))
    with counted(writing, row.id):
        connection.execute(delete(versions).where(versions.c.adapter_id == row.id))
    connection.execute(delete(adapters).where(adapters.c.id == row.id))
    writing.num_adapters -= 1
    writing.record(name, "removed", {"versions": len(gone)})
    return gone


def why_it_stays(connection: Connection, name: str) -> str | None:
    """Which other names lead to versions of the adapter ``name``, so that it cannot be removed; None: no other does."""
    others = connection.execute(
        select(targets.c.alias)
        .join(versions, versions.c.id == targets.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(adapters.c.name == name, targets.c.alias != name)
        .distinct()
        .limit(4)
    ).scalars()
    leading = list(others)
    if not leading:
        return None
    shown = ", ".join(map(repr, leading[:3])) + " and others" * (len(leading) > 3)
    return f"{shown} lead{'s' * (len(leading) == 1)} to it"


def due(adapter: dict[str, Any], now: float) -> float | None:
    """When somebody should work on ``adapter`` (its columns); None: nobody should."""
    start: float | None = None
    if adapter["phase"] == "Failed":
        start = adapter["retry_at"]
    elif adapter["phase"] in _UNDER_WAY and not (adapter["lazy"] and adapter["phase"] == "Registered"):
        start = now
    claimed = adapter["claimed_until"]
    return start if start is None or claimed is None else max(start, claimed)


def is_superseded(row: Row[Any], of: Registration | None) -> bool:
    """Whether the adapter has begun anew since it was read as ``of``, or somebody else has finished it meanwhile."""
    if of is None:
        return False
    return bool(row.began != of.began) or (row.phase != of.phase and row.phase in ("Ready", "Retired"))


def check_current(row: Row[Any], version: AdapterVersion, of: Registration | None) -> None:
    """Raise AdapterConflict when ``version`` is not what is wanted of the adapter any more."""
    if is_superseded(row, of):
        raise AdapterConflict(f"adapter {row.name!r} was registered anew, or became ready, meanwhile", "name")
    if version.source is not None and version.source != registration_of(row).spec.source:
        raise AdapterConflict(f"adapter {row.name!r} has another source by now; this version is not from there", "name")


def _check(connection: Connection, name: str, replace: bool) -> Row[Any] | None:
    if problem := name_problem(name):
        raise InvalidRequest(problem, "adapter")
    meaning = connection.execute(select(aliases).where(aliases.c.name == name)).one_or_none()
    if meaning is None:
        return None
    if meaning.adapter_id is None:
        raise InvalidRequest(f"{name!r} is an alias; remove it first", "adapter")
    if not replace:
        raise AdapterExists(f"adapter {name!r} is loaded already; unload it first", "adapter")
    return existing(connection, name)
