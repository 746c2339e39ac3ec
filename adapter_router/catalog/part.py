"""What all parts of the catalog are made of."""

from __future__ import annotations

from adapter_router.catalog.database import Database


class Part:
    """Some of the catalog's methods: those about one noun. All parts share the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
