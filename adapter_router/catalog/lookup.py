"""Adapters by name and versions by address: any number in a fixed number of statements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select

from adapter_router.catalog.addressing import Address
from adapter_router.catalog.tables import adapters, versions

_CHUNK = 500  # names in one statement
_ADDRESSES = 50

_Item = TypeVar("_Item")


def adapters_named(connection: Connection, names: Collection[str]) -> dict[str, Row[Any]]:
    """Those of ``names`` that are registered."""
    found = {}
    for chunk in chunks(names, _CHUNK):
        found.update({row.name: row for row in connection.execute(select(adapters).where(adapters.c.name.in_(chunk)))})
    return found


def versions_at(
    connection: Connection, known: Mapping[str, Row[Any]], addresses: Collection[Address]
) -> dict[Address, Row[Any] | str]:
    """The version that each of ``addresses`` means, or why it means none. ``known``: their adapters, by name."""
    ids = {address: known[address.adapter].id for address in addresses if address.adapter in known}
    rows: defaultdict[int, list[Row[Any]]] = defaultdict(list)
    for chunk in chunks(ids, _ADDRESSES):
        query = select(versions).where(or_(*(_is_meant(address, ids[address]) for address in chunk)))
        for row in connection.execute(query.order_by(versions.c.number.desc())):
            rows[row.adapter_id].append(row)
    return {
        address: _one_of(address, rows[ids[address]]) if address in ids else f"no adapter is named {address.adapter!r}"
        for address in addresses
    }


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """``items`` in lists of at most ``size``."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _is_meant(address: Address, adapter_id: int) -> ColumnElement[bool]:
    of_it = versions.c.adapter_id == adapter_id
    if address.number is not None:
        return and_(of_it, versions.c.number == address.number)
    # Whatever begins with it: a digest goes on with hexadecimal digits, which all come before g.
    return and_(of_it, versions.c.digest >= address.digest, versions.c.digest < f"{address.digest}g")


def _one_of(address: Address, of_adapter: Sequence[Row[Any]]) -> Row[Any] | str:
    """The version that is meant among those given newest first, or why there is none."""
    named = f"v{address.number}" if address.number is not None else str(address.digest)
    found = [row for row in of_adapter if address.number == row.number or row.digest.startswith(named)]
    if not found:
        return f"adapter {address.adapter!r} has no version {named}"
    present = [row for row in found if row.retired is None]
    if not present:
        return f"{address.adapter}@{named} was retired"
    if len({row.digest for row in present}) > 1:
        return f"{address.adapter}@{named} is the beginning of several versions' digests"
    return present[0]
