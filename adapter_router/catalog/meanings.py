"""What names mean now: the catalog's answer to those who serve rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import Connection, select

from adapter_router.catalog.addressing import address_of, not_found
from adapter_router.catalog.close_names import nothing_named
from adapter_router.catalog.encoding import registration_of, version_of
from adapter_router.catalog.lookup import adapters_named, chunks, versions_at
from adapter_router.catalog.part import Part
from adapter_router.catalog.records import Route
from adapter_router.catalog.tables import adapters, clock, targets, versions
from adapter_router.errors import AdapterNotFound
from adapter_router.types import AdapterVersion

_CHUNK = 500  # names in one statement
_EXPLAINED = 8  # unknown names of one call that are compared with all others


class Meanings(Part):
    """The catalog's methods about what names mean."""

    def routes(self, names: Collection[str]) -> dict[str, Route]:
        """What each of ``names`` means: adapters, aliases and addresses of versions; what means nothing is left out."""
        with self._database.reading() as connection:
            return _routes(connection, names)

    def routes_at(self, names: Collection[str]) -> tuple[int, dict[str, Route | AdapterNotFound]]:
        """``routes``, why the others mean nothing, and the revision all this is of."""
        with self._database.reading() as connection:
            revision: int = connection.execute(select(clock.c.revision)).scalar_one()
            found: dict[str, Route | AdapterNotFound] = {**_routes(connection, names)}
            unknown = [name for name in names if name not in found]
            for number, name in enumerate(unknown):
                found[name] = _why_not(connection, name) if number < _EXPLAINED else not_found(name)
            return revision, found

    def preloaded(self, base_fingerprint: str) -> list[tuple[AdapterVersion, bool]]:
        """What a replica of this base shall hold before it is ready, and whether it is pinned there."""
        with self._database.reading() as connection:
            query = select(adapters.c.name).where(adapters.c.wanted.is_(True)).order_by(adapters.c.name)
            routes = _routes(connection, list(connection.execute(query).scalars()))
        wanted: dict[str, tuple[AdapterVersion, bool]] = {}
        for route in routes.values():
            assert route.registration is not None
            for version, _ in route.choices:
                if version.base == base_fingerprint:
                    pinned = route.registration.spec.pinned or wanted.get(version.digest, (version, False))[1]
                    wanted[version.digest] = (version, pinned)
        return list(wanted.values())


def _routes(connection: Connection, names: Collection[str]) -> dict[str, Route]:
    addresses = {name: address for name in names if (address := address_of(name)) is not None}
    known = adapters_named(connection, {address.adapter for address in addresses.values()})
    exact = versions_at(connection, known, {address for address in addresses.values() if address.is_version})
    choices = _choices(connection, [name for name, address in addresses.items() if not address.is_version])
    routes = {}
    for name, address in addresses.items():
        registration = registration_of(known[address.adapter]) if address.adapter in known else None
        if registration is None:
            if name in choices:
                routes[name] = Route(name, choices[name])
        elif not address.is_version:
            retired = registration.phase == "Retired"
            routes[name] = Route(name, () if retired else choices.get(name, ()), registration)
        elif not isinstance(row := exact[address], str) and registration.phase != "Retired":
            routes[name] = Route(name, ((version_of(address.adapter, row.digest, row.body), 1),), registration)
    return routes


def _choices(connection: Connection, names: Collection[str]) -> dict[str, tuple[tuple[AdapterVersion, int], ...]]:
    found: defaultdict[str, list[tuple[AdapterVersion, int]]] = defaultdict(list)
    for chunk in chunks(names, _CHUNK):
        query = (
            select(targets.c.alias, targets.c.weight, versions.c.digest, versions.c.body, adapters.c.name)
            .join(versions, versions.c.id == targets.c.version_id)
            .join(adapters, adapters.c.id == versions.c.adapter_id)
            .where(targets.c.alias.in_(chunk), targets.c.weight > 0)
            .order_by(adapters.c.name, versions.c.number)
        )
        for row in connection.execute(query):
            found[row.alias].append((version_of(row.name, row.digest, row.body), row.weight))
    return {name: tuple(choices) for name, choices in found.items()}


def _why_not(connection: Connection, name: str) -> AdapterNotFound:
    address = address_of(name)
    if address is None:
        return not_found(name)
    known = adapters_named(connection, [address.adapter])
    if not known or not address.is_version:
        return nothing_named(connection, address.adapter)
    why = versions_at(connection, known, [address])[address]
    return AdapterNotFound(why if isinstance(why, str) else f"adapter {address.adapter!r} was retired", "model")
