"""What has happened: a log for people, and the news that others who keep parts of the catalog in memory follow."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from adapter_router.catalog.part import Part
from adapter_router.catalog.records import Event
from adapter_router.catalog.tables import adapters, clock, events, targets, versions

_EVENTS_PER_NAME = 10  # a feed of more events than this for each name asked for is not worth reading


class Feed(Part):
    """The catalog's methods about events."""

    def events(self, name: str | None = None, after: int = 0, limit: int = 100) -> list[Event]:
        """At most ``limit`` events, oldest first: those after the revision ``after``, of ``name`` if one is given."""
        query = select(events).where(events.c.revision > after).order_by(events.c.revision).limit(limit)
        if name is not None:
            query = query.where(events.c.name == name)
        with self._database.reading() as connection:
            return [Event(*row) for row in connection.execute(query)]

    def revision(self) -> int:
        """The number of the last change."""
        with self._database.reading() as connection:
            return _revision(connection)

    def changes(self, since: int, limit: int = 1000) -> tuple[int, frozenset[str]] | None:
        """The present revision and the names that may mean something else than at ``since``.

        None where they are more than ``limit``, or nobody remembers: then everything may have changed.
        """
        with self._database.reading() as connection:
            revision = _revision(connection)
            if revision == since:
                return revision, frozenset()
            first = connection.execute(select(func.min(events.c.revision))).scalar()
            if since > revision or first is None or first > since + 1 or revision - since > limit * _EVENTS_PER_NAME:
                return None
            # Not DISTINCT: the index by name would be read from end to end for it.
            names = set(connection.execute(select(events.c.name).where(events.c.revision > since)).scalars())
            if len(names) > limit:
                return None
            # A version's own record may have changed, so whatever leads to one of a touched adapter counts.
            leading = (
                select(targets.c.alias)
                .join(versions, versions.c.id == targets.c.version_id)
                .join(adapters, adapters.c.id == versions.c.adapter_id)
                .where(adapters.c.name.in_(names))
                .distinct()
                .limit(limit + 1)
            )
            names |= set(connection.execute(leading).scalars())
            return None if len(names) > limit else (revision, frozenset(names))


def _revision(connection: Connection) -> int:
    revision: int = connection.execute(select(clock.c.revision)).scalar_one()
    return revision
