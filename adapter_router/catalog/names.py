"""Adapters by name, in memory: of an engine that stands alone. What a name means changes in one step."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from adapter_router.catalog.addressing import address_of, find_any, name_problem, not_found
from adapter_router.catalog.close_names import hint
from adapter_router.errors import AdapterExists, AdapterNotFound, AdapterRouterError, InvalidRequest
from adapter_router.types import AdapterVersion

_MOST_COMPARED = 200  # names, when guessing which one was meant: it is done while others wait


class Names:
    """Name -> version. Thread-safe."""

    def __init__(self) -> None:
        self._versions: dict[str, AdapterVersion] = {}
        self._lock = threading.Lock()

    def check_name(self, adapter: str, *, replace: bool = False) -> None:
        """Raise InvalidRequest for what cannot be a name, AdapterExists for one that is taken unless ``replace``."""
        if problem := name_problem(adapter):
            raise InvalidRequest(problem, "adapter")
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
        self,
        adapter: str | Mapping[str, float] | None,
        head: str | None = None,
        sticky_key: str | None = None,  # noqa: ARG002 - a name means one version here
    ) -> AdapterVersion | AdapterRouterError | None:
        """What a row's ``adapter`` and ``head`` mean: a version, None for the bare base, or the error to answer.

        ``name@sha256:…`` is the version of that name if it has this content.
        """
        return find_any(adapter, head, self._find)

    def holds(self, digest: str) -> bool:
        """Whether any name means the content ``digest``."""
        with self._lock:
            return any(version.digest == digest for version in self._versions.values())

    def versions(self) -> list[AdapterVersion]:
        """All versions, in the order of their names' registration."""
        with self._lock:
            return list(self._versions.values())

    def _find(self, adapter: str) -> AdapterVersion | AdapterNotFound:
        if version := self._versions.get(adapter):
            return version
        address = address_of(adapter)
        if address is None or address.digest is None or (meant := self._versions.get(address.adapter)) is None:
            return self._not_found(adapter)
        if meant.digest.startswith(address.digest):
            return meant
        return AdapterNotFound(f"adapter {address.adapter!r} has no version {address.digest}", "model")

    def _not_found(self, adapter: str) -> AdapterNotFound:
        with self._lock:
            alike = [name for name in self._versions if name[:1] == adapter[:1] or name[-3:] == adapter[-3:]]
        return not_found(adapter, hint(adapter, alike[:_MOST_COMPARED]))
