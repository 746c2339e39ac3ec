"""The catalog brought in line with a declaration. What nobody declares and no manifest manages is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, select

from adapter_router.catalog.addressing import name_problem
from adapter_router.catalog.database import Writing
from adapter_router.catalog.differences import Difference, check_unique, compare
from adapter_router.catalog.encoding import registration_of
from adapter_router.catalog.lookup import chunks
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import AdapterSpec, Registration
from adapter_router.catalog.registrations import adopt, enter, strike, why_it_stays
from adapter_router.catalog.tables import adapters, aliases

_CHUNK = 200  # adapters in one statement, or in one transaction: others want to write, too


class Reconciling(Part):
    """The catalog's methods about declarations. They look at everything that is declared or managed."""

    def drift(self, declared: Sequence[AdapterSpec]) -> list[Difference]:
        """How the catalog differs from ``declared``, in its order, and what is to be removed after that.

        Raises InvalidRequest when a name is declared twice.
        """
        check_unique(declared)
        with self._database.reading() as connection:
            differences = []
            for chunk in chunks(declared, _CHUNK):
                found = _found(connection, [spec.name for spec in chunk])
                for spec in chunk:
                    known = found[spec.name]
                    difference = known if isinstance(known, Difference) else compare(spec, known)
                    differences += [difference] if difference else []
            names = {spec.name for spec in declared}
            managed = select(adapters.c.name).where(adapters.c.managed.is_(True)).order_by(adapters.c.name)
            gone = [name for name in connection.execute(managed).scalars() if name not in names]
            return differences + [_removed(connection, name) for name in gone]

    def reconcile(self, declared: Sequence[AdapterSpec]) -> list[Difference]:
        """Bring the catalog in line with ``declared``; returns what has been done, and the conflicts.

        The same again does nothing; one that is interrupted is finished by the next. Raises InvalidRequest when a name
        is declared twice.
        """
        differences = self.drift(declared)
        specs = {spec.name: spec for spec in declared}
        done = self._settle([each for each in differences if each.name in specs], specs)
        gone = [each for each in differences if each.name not in specs]
        while gone:
            removed = self._settle(gone, specs)
            done += [each for each in removed if each.kind == "removed"]
            stay = [each for each in removed if each.kind == "conflict"]
            if len(stay) == len(gone):
                return done + stay
            gone = stay  # one that has been removed may have led to them
        return done

    def _settle(self, differences: Sequence[Difference], specs: Mapping[str, AdapterSpec]) -> list[Difference]:
        done = []
        for chunk in chunks(differences, _CHUNK):
            with self._database.writing() as writing:
                # What differed a moment ago may have been mended by another router, or have changed again.
                settled = [_settle(writing, difference.name, specs.get(difference.name)) for difference in chunk]
            done += [difference for difference in settled if difference is not None]
        return done


def _found(connection: Connection, names: Sequence[str]) -> dict[str, Registration | Difference | None]:
    """What each name is: an adapter, nothing, or something that no adapter can be named."""
    found: dict[str, Registration | Difference | None] = dict.fromkeys(names)
    for row in connection.execute(select(adapters).where(adapters.c.name.in_(names))):
        found[row.name] = registration_of(row)
    others = select(aliases.c.name).where(aliases.c.name.in_(names), aliases.c.adapter_id.is_(None))
    for name in connection.execute(others).scalars():
        found[name] = Difference(name, "conflict", reason="it is an alias; remove that, or declare another name")
    for name in names:
        if problem := name_problem(name):
            found[name] = Difference(name, "conflict", reason=problem)
    return found


def _settle(writing: Writing, name: str, spec: AdapterSpec | None) -> Difference | None:
    """Do what is to be done about ``name`` now, None: forget it; returns what that was."""
    (found,) = _found(writing.connection, [name]).values()
    if spec is None:
        if not isinstance(found, Registration) or not found.managed:
            return None
        now: Difference | None = _removed(writing.connection, name)
    else:
        now = found if isinstance(found, Difference) else compare(spec, found)
    if now is None or now.kind == "conflict":
        return now
    if spec is None:
        strike(writing, name)
    elif now.kind == "added" or now.is_content:
        enter(writing, spec, replace=True, managed=True)
    else:
        adopt(writing, spec)
    return now


def _removed(connection: Connection, name: str) -> Difference:
    """How an adapter that is declared no longer differs."""
    reason = why_it_stays(connection, name)
    return Difference(name, "removed" if reason is None else "conflict", reason=reason)
