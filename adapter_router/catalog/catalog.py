"""The catalog: which adapters there are, their versions, what names mean, and what has happened.

It outlives every process. Each write is one transaction, seen by everybody or by nobody; no method takes longer for
many registered adapters than for few, except as far as it returns them.
"""

from __future__ import annotations

import time

from adapter_router.catalog.aliases import Aliases
from adapter_router.catalog.claims import Claims
from adapter_router.catalog.database import KEPT_EVENTS, Clock, Database
from adapter_router.catalog.feed import Feed
from adapter_router.catalog.meanings import Meanings
from adapter_router.catalog.overview import Overview
from adapter_router.catalog.reconciling import Reconciling
from adapter_router.catalog.registrations import Registrations
from adapter_router.catalog.versions import Versions


class Catalog(Registrations, Claims, Versions, Aliases, Feed, Meanings, Reconciling, Overview):
    """All parts of one catalog. Thread-safe; every method waits for the database: none for an event loop.

    Every method raises CatalogUnavailable when the database cannot be reached.
    """

    def __init__(self, url: str, *, now: Clock = time.time, kept_events: int = KEPT_EVENTS) -> None:
        """``url``: ``sqlite:///…`` or ``postgresql+psycopg://…``; the schema is created, or upgraded, by this.

        ``kept_events``: how many are remembered. Raises ValueError for another URL, and for a schema of newer code.
        """
        super().__init__(Database(url, now, kept_events))

    def close(self) -> None:
        """Close the connections."""
        self._database.close()
