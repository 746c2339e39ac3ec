"""Registered adapters by name. What a name means changes in one step; versions never change."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from adapter_router.catalog.mixing import mixed, weight_problems
from adapter_router.errors import AdapterExists, AdapterNotFound, AdapterRouterError, InvalidRequest
from adapter_router.types import AdapterVersion, Row

_MOST_COMPARED = 200  # names, when guessing which one was meant: it is done while others wait
_LONGEST_GUESSED = 100


_Found = TypeVar("_Found")


def each_version(
    rows: Sequence[Row], find: Callable[[str | Mapping[str, float] | None, str | None], _Found]
) -> list[_Found]:
    """What every row's ``adapter`` and ``head`` mean, each asked of ``find`` once."""
    known: dict[tuple[object, str | None], _Found] = {}
    found = []
    for row in rows:
        key = (row.adapter if isinstance(row.adapter, str | None) else id(row.adapter), row.head)
        if key not in known:
            known[key] = find(row.adapter, row.head)
        found.append(known[key])
    return found


class Catalog:
    """Name -> version. Thread-safe."""

    def __init__(self) -> None:
        self._versions: dict[str, AdapterVersion] = {}
        self._lock = threading.Lock()

    def check_name(self, adapter: str, *, replace: bool = False) -> None:
        """Raise InvalidRequest for what cannot be a name, AdapterExists for one that is taken unless ``replace``."""
        if not adapter or not adapter.isprintable():
            raise InvalidRequest(f"{adapter!r} cannot name an adapter", "adapter")
        with self._lock:
            if adapter in self._versions and not replace:
                raise AdapterExists(f"adapter {adapter!r} is loaded already; unload it first", "adapter")

    def add(self, version: AdapterVersion, *, replace: bool = False) -> None:
        """Let ``version.adapter`` mean ``version`` from now on. Raises AdapterExists unless ``replace``."""
        with self._lock:
            if version.adapter in self._versions and not replace:
                raise AdapterExists(f"adapter {version.adapter!r} is loaded already; unload it first", "adapter")
            self._versions[version.adapter] = version

    def remove(self, adapter: str) -> AdapterVersion:
        """Forget a name; returns what it meant. Raises AdapterNotFound."""
        with self._lock:
            version = self._versions.pop(adapter, None)
        if version is None:
            raise self._not_found(adapter)
        return version

    def find(
        self, adapter: str | Mapping[str, float] | None, head: str | None = None
    ) -> AdapterVersion | AdapterRouterError | None:
        """What a row's ``adapter`` and ``head`` mean: a version, None for the bare base, or the error to answer."""
        if isinstance(adapter, Mapping):
            return self._find_mix(adapter, head)
        if head is not None:
            return InvalidRequest("head chooses among the adapters of a mix; this is none", "head")
        if adapter is None:
            return None
        return self._versions.get(adapter) or self._not_found(adapter)

    def _find_mix(self, weights: Mapping[str, float], head: str | None) -> AdapterVersion | AdapterRouterError:
        if problems := weight_problems(weights, head):
            return InvalidRequest("; ".join(problems), "model", problems)
        found = {name: self._versions.get(name) for name in weights}
        versions = {name: version for name, version in found.items() if version is not None}
        if missing := [name for name in found if name not in versions]:
            others = [f"no adapter is named {name!r:.80}" for name in missing[1:]]
            problems = [self._not_found(missing[0]).message, *others]
            return AdapterNotFound("; ".join(problems), "model", problems if others else ())
        try:
            return mixed(weights, versions, head)
        except InvalidRequest as error:
            return error

    def holds(self, digest: str) -> bool:
        """Whether any name means the content ``digest``."""
        with self._lock:
            return any(version.digest == digest for version in self._versions.values())

    def versions(self) -> list[AdapterVersion]:
        """All versions, in the order of their names' registration."""
        with self._lock:
            return list(self._versions.values())

    def _not_found(self, adapter: str) -> AdapterNotFound:
        with self._lock:
            alike = [name for name in self._versions if name[:1] == adapter[:1] or name[-3:] == adapter[-3:]]
        close = difflib.get_close_matches(adapter[:_LONGEST_GUESSED], alike[:_MOST_COMPARED], n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        return AdapterNotFound(f"no adapter is named {adapter!r:.200}{hint}", "model")
