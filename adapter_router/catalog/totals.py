"""Running totals of all unretired versions, by base: what capacity is compared with, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, func, insert, select, update

from adapter_router.catalog.database import Writing
from adapter_router.catalog.records import Total
from adapter_router.catalog.tables import totals, versions


@contextmanager
def counted(writing: Writing, adapter_id: int) -> Iterator[None]:
    """Let the totals follow what the body does to one adapter's versions."""
    before = _of_adapter(writing.connection, adapter_id)
    yield
    after = _of_adapter(writing.connection, adapter_id)
    none = (0, 0)
    for base in before.keys() | after.keys():
        (were, bytes_were), (are, bytes_are) = before.get(base, none), after.get(base, none)
        change = (int(are > 0) - int(were > 0), are - were, bytes_are - bytes_were)
        if any(change):
            _add(writing.connection, base, change)


def read_totals(connection: Connection) -> dict[str, Total]:
    """All totals, by base."""
    return {row.base: Total(row.adapters, row.versions, row.num_bytes) for row in connection.execute(select(totals))}


def _of_adapter(connection: Connection, adapter_id: int) -> dict[str, tuple[int, int]]:
    """Number and bytes of an adapter's unretired versions, by base."""
    query = (
        select(versions.c.base, func.count(), func.sum(versions.c.num_bytes))
        .where(versions.c.adapter_id == adapter_id, versions.c.retired.is_(None))
        .group_by(versions.c.base)
    )
    return {base: (number, int(num_bytes)) for base, number, num_bytes in connection.execute(query)}


def _add(connection: Connection, base: str, change: tuple[int, int, int]) -> None:
    columns = (totals.c.adapters, totals.c.versions, totals.c.num_bytes)
    raised = {column.name: column + more for column, more in zip(columns, change, strict=True)}
    if connection.execute(update(totals).where(totals.c.base == base).values(raised)).rowcount == 0:
        values = {column.name: more for column, more in zip(columns, change, strict=True)}
        connection.execute(insert(totals).values(base=base, **values))
