"""What is said of a name that means nothing: the names like it."""

from __future__ import annotations

import difflib

from sqlalchemy import Connection, select, union_all

from adapter_router.catalog.addressing import not_found
from adapter_router.catalog.tables import aliases
from adapter_router.errors import AdapterNotFound

_COMPARED = 100  # before and after it in the alphabet: whoever mistypes gets the beginning right
_LONGEST = 100


def nothing_named(connection: Connection, name: str) -> AdapterNotFound:
    """The error for ``name``, be it only that it is an alias. Queries of a fixed number of rows."""
    known = aliases.c.name
    if connection.execute(select(known).where(known == name)).scalar() is not None:
        return AdapterNotFound(f"{name!r} is an alias, not an adapter", "model")
    before = select(known).where(known < name).order_by(known.desc()).limit(_COMPARED).subquery()
    after = select(known).where(known > name).order_by(known).limit(_COMPARED).subquery()
    names = connection.execute(union_all(select(before.c.name), select(after.c.name))).scalars()
    return not_found(name, hint(name, list(names)))


def hint(name: str, known: list[str]) -> str:
    """The end of a sentence that says there is no ``name``."""
    close = difflib.get_close_matches(name[:_LONGEST], known, n=3)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
