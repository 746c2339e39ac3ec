"""A router's memory of what names mean: bounded, and never behind the changes that it has followed."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping

from adapter_router.catalog.addressing import address_of, find_any, not_found
from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import Registration, Route
from adapter_router.catalog.splitting import choose
from adapter_router.errors import AdapterFailed, AdapterNotFound, AdapterRouterError, AdapterUnavailable
from adapter_router.types import AdapterVersion

_UNDER_WAY = ("Registered", "Fetching", "Validating")
_MOST_CHANGES = 1000  # names that are read again one by one; beyond that only the most recently used are

_Known = tuple[int, Route | AdapterNotFound]  # the revision it was read at


class Routes:
    """What names mean, as far as somebody has asked; names that mean nothing, too. Thread-safe.

    ``missing``, ``is_pending`` and ``find`` only look into memory; ``fetch`` and ``follow`` wait for the database.
    What a name meant at the revision that was followed last, or later, is what ``find`` says of it. A name that has
    changed is read again before the old answer goes, so nobody who has fetched it finds a gap.
    """

    def __init__(self, catalog: Catalog, capacity: int = 10_000) -> None:
        """``capacity``: names that are remembered, the most recently used."""
        self._catalog = catalog
        self._capacity = capacity
        self._revision: int | None = None  # nothing in memory is of an earlier one
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._names_of: defaultdict[str, set[str]] = defaultdict(set)  # of what is known, by adapter or alias
        self._lock = threading.Lock()
        self._following = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def missing(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that must be fetched before ``find`` can tell what they mean."""
        missing = set()
        with self._lock:
            for name in names:
                if name in self._known:
                    self._known.move_to_end(name)
                elif address_of(name) is not None:
                    missing.add(name)
        return missing

    def fetch(self, names: Collection[str]) -> None:
        """Read what ``names`` mean. Raises CatalogUnavailable."""
        if not self._fetch(names):
            # A change was followed meanwhile, and what was read may be of before it; now none can be.
            with self._following:
                self._fetch(names)

    def follow(self) -> None:
        """Take note of all that has changed since the last call. Raises CatalogUnavailable."""
        with self._following:
            if self._revision is None:
                return  # nothing is known
            changes = self._catalog.changes(self._revision, _MOST_CHANGES)
            if changes is None:
                self._follow_anything(self._catalog.revision())
            elif changes[0] != self._revision:
                self._read_again(*changes)

    def is_pending(self, name: str, served_bases: Collection[str]) -> bool:
        """Whether rows for ``name`` wait until its files have been fetched and checked, on a base that is served.

        Not those of an adapter that has failed before: they are told why. An adapter that was checked on other bases
        only must be checked again, unless it wants none but those.
        """
        with self._lock:
            _, route = self._known.get(name, (0, None))
        if not isinstance(route, Route) or route.registration is None or route.registration.reason is not None:
            return False
        if not route.choices:
            return route.registration.phase in _UNDER_WAY
        if name != route.registration.spec.name or any(version.base in served_bases for version, _ in route.choices):
            return False
        base = route.registration.spec.base
        return base is None or base in served_bases

    def find(
        self, adapter: str | Mapping[str, float] | None, head: str | None = None, sticky_key: str | None = None
    ) -> AdapterVersion | AdapterRouterError | None:
        """What answers a row: a version, None for the bare base, or the error to answer."""
        return find_any(adapter, head, lambda name: self._find(name, sticky_key))

    def _find(self, name: str, sticky_key: str | None) -> AdapterVersion | AdapterRouterError:
        with self._lock:
            _, route = self._known.get(name, (0, None))
        if route is None:
            if address_of(name) is None:
                return not_found(name)
            return AdapterUnavailable(f"what {name!r} means has not been looked up yet; try again", "model")
        if isinstance(route, AdapterNotFound):
            return AdapterNotFound(*route.args)
        if route.choices:
            return choose(name, route.choices, sticky_key)
        assert route.registration is not None
        return _why_nothing_answers(route.registration)

    def _fetch(self, names: Collection[str]) -> bool:
        """Read ``names``; False where what was read may be out of date already, and is not remembered."""
        revision, found = self._catalog.routes_at(names)
        with self._lock:
            if self._revision is None:
                self._revision = revision
            if revision < self._revision:
                return False
            for name, route in found.items():
                self._remember(name, (revision, route))
        return True

    def _follow_anything(self, revision: int) -> None:
        if self._revision is not None and revision < self._revision:  # the database was restored to an earlier state
            with self._lock:
                self._known.clear()
                self._names_of.clear()
                self._revision = revision
        self._read_again(revision, None)

    def _read_again(self, revision: int, changed: Collection[str] | None) -> None:
        """Bring what is known of ``changed`` (None: of everything) to ``revision``, and let it count as followed."""
        while True:
            with self._lock:
                stale = self._stale(revision, changed)
                if not stale:
                    self._revision = revision
                    return
            read_at, found = self._catalog.routes_at(stale)
            if read_at < revision:
                return  # the database has been restored to an earlier state just now: the next call finds that out
            with self._lock:
                for name, route in found.items():
                    if name in self._known:
                        self._known[name] = (read_at, route)

    def _stale(self, revision: int, changed: Collection[str] | None) -> list[str]:
        if changed is not None:
            names = [name for each in changed for name in self._names_of.get(each, ())]
            return [name for name in names if self._known[name][0] < revision]
        stale = [name for name, (read_at, _) in self._known.items() if read_at < revision]
        for name in stale[:-_MOST_CHANGES]:
            self._forget(name)
        return stale[-_MOST_CHANGES:]

    def _remember(self, name: str, known: _Known) -> None:
        address = address_of(name)
        if address is None:
            return
        self._known[name] = known
        self._known.move_to_end(name)
        self._names_of[address.adapter].add(name)
        while len(self._known) > self._capacity:
            self._forget(next(iter(self._known)))

    def _forget(self, name: str) -> None:
        del self._known[name]
        adapter = name.partition("@")[0]
        self._names_of[adapter].discard(name)
        if not self._names_of[adapter]:
            del self._names_of[adapter]


def _why_nothing_answers(registration: Registration) -> AdapterRouterError:
    name, reason = registration.spec.name, registration.reason
    if registration.phase == "Retired":
        return AdapterNotFound(f"adapter {name!r} was retired", "model")
    if registration.phase == "Ready":
        return AdapterFailed(f"adapter {name!r} has a version, but its name means none; let it mean one", "model")
    if reason is None:
        return AdapterUnavailable(f"adapter {name!r} is being fetched and checked; try again", "model")
    kind = AdapterUnavailable if registration.retryable else AdapterFailed
    return kind(f"adapter {name!r} cannot be served: {reason}", "model", registration.problems)
