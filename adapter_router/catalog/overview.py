"""What people look at, a page at a time: which version stands behind a name, and which name behind a digest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import Connection, select

from adapter_router.catalog.encoding import registration_of, version_of
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import Registration, Target, Total
from adapter_router.catalog.tables import adapters, aliases, targets, versions
from adapter_router.catalog.totals import read_totals
from adapter_router.types import AdapterVersion

Meant = tuple[tuple[Target, AdapterVersion], ...]
"""The versions that a name leads to, with their shares; those of weight 0 too."""


class Overview(Part):
    """The catalog's methods for those who look at it. Each costs what it is asked about."""

    def names(self, after: str | None = None, limit: int = 100) -> list[tuple[str, Registration | None, Meant]]:
        """At most ``limit`` names that rows can use, those after ``after``: adapters, and aliases (no registration)."""
        query = select(aliases.c.name, aliases.c.adapter_id).order_by(aliases.c.name).limit(limit)
        if after is not None:
            query = query.where(aliases.c.name > after)
        with self._database.reading() as connection:
            found = connection.execute(query).all()
            meant = _meant(connection, [row.name for row in found])
            of_adapters = select(adapters).where(adapters.c.id.in_([row.adapter_id for row in found]))
            known = {row.name: registration_of(row) for row in connection.execute(of_adapters)}
            return [(row.name, known.get(row.name), meant.get(row.name, ())) for row in found]

    def meant(self, names: Collection[str]) -> dict[str, Meant]:
        """What adapters' own names and aliases lead to; what leads nowhere is left out."""
        with self._database.reading() as connection:
            return _meant(connection, names)

    def numbers(self, digests: Collection[str]) -> dict[str, list[tuple[str, int]]]:
        """Adapters and numbers of all unretired versions of these contents, by digest."""
        query = (
            select(versions.c.digest, versions.c.number, adapters.c.name)
            .join(adapters, adapters.c.id == versions.c.adapter_id)
            .where(versions.c.digest.in_(list(digests)), versions.c.retired.is_(None))
            .order_by(adapters.c.name, versions.c.number)
        )
        found: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        with self._database.reading() as connection:
            for row in connection.execute(query):
                found[row.digest].append((row.name, row.number))
        return dict(found)

    def totals(self) -> dict[str, Total]:
        """How many adapters and versions there are for each base, and how large they are together."""
        with self._database.reading() as connection:
            return read_totals(connection)

    def failed_declared(self, limit: int = 100) -> list[Registration]:
        """At most ``limit`` adapters, by name, that a manifest declares and that cannot be served."""
        query = (
            select(adapters)
            .where(adapters.c.phase == "Failed", adapters.c.managed.is_(True))
            .order_by(adapters.c.name)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [registration_of(row) for row in connection.execute(query)]


def _meant(connection: Connection, names: Collection[str]) -> dict[str, Meant]:
    query = (
        select(
            targets.c.alias, targets.c.weight, versions.c.number, versions.c.digest, versions.c.body, adapters.c.name
        )
        .join(versions, versions.c.id == targets.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(targets.c.alias.in_(list(names)))
        .order_by(adapters.c.name, versions.c.number)
    )
    found: defaultdict[str, list[tuple[Target, AdapterVersion]]] = defaultdict(list)
    for row in connection.execute(query):
        version = version_of(row.name, row.digest, row.body)
        found[row.alias].append((Target(row.name, row.number, row.weight), version))
    return {name: tuple(led_to) for name, led_to in found.items()}
