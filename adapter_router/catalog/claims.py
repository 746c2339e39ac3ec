"""Who works on which registration, so that nobody does it twice and nothing is left lying."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from adapter_router.catalog.database import Writing
from adapter_router.catalog.part import Part
from adapter_router.catalog.registrations import due
from adapter_router.catalog.tables import adapters


class Claims(Part):
    """The catalog's methods about claims. They change nothing that a name means, and leave no events."""

    def claim(self, name: str, owner: str, seconds: float) -> bool:
        """Let only ``owner`` work on ``name`` for ``seconds`` from now; whoever has the claim prolongs it so.

        False while another has it, and for an adapter that is not there.
        """
        with self._database.writing() as writing:
            row = writing.connection.execute(select(adapters).where(adapters.c.name == name)).one_or_none()
            if row is None or (row.claimed_by not in (None, owner) and row.claimed_until > writing.now):
                return False
            _set(writing, {**row._mapping}, owner, writing.now + seconds)
            return True

    def release(self, name: str, owner: str) -> None:
        """Give a claim back; nothing happens when ``owner`` has none."""
        with self._database.writing() as writing:
            query = select(adapters).where(adapters.c.name == name, adapters.c.claimed_by == owner)
            if row := writing.connection.execute(query).one_or_none():
                _set(writing, {**row._mapping}, None, None)

    def unfinished(self, limit: int = 100) -> list[str]:
        """At most ``limit`` adapters that somebody should work on now, and nobody does; the longest waiting first.

        Those under way (a lazy one when it has been asked for), and Failed ones that are to be tried again.
        """
        query = select(adapters.c.name).where(adapters.c.due <= self._database.now())
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(adapters.c.due).limit(limit)).scalars())


def _set(writing: Writing, adapter: dict[str, Any], owner: str | None, until: float | None) -> None:
    adapter["claimed_until"] = until
    values = {"claimed_by": owner, "claimed_until": until, "due": due(adapter, adapter["updated"])}
    writing.connection.execute(update(adapters).where(adapters.c.id == adapter["id"]).values(values))
