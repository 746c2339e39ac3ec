"""The place that belongs to an address."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from adapter_router.catalog.sources.address import Address
from adapter_router.catalog.sources.clients import Clients
from adapter_router.catalog.sources.hub import HubRepository, cached
from adapter_router.catalog.sources.objects import ObjectStores
from adapter_router.catalog.sources.place import Place, refused
from adapter_router.catalog.sources.policy import Policy
from adapter_router.catalog.sources.threads import in_thread
from adapter_router.catalog.sources.web import Web
from adapter_router.config import SourceConfig


class Places:
    """Opens places. Thread-safe."""

    def __init__(self, policy: Policy, config: SourceConfig) -> None:
        self._policy = policy
        self._idle_timeout_s = config.idle_timeout_s
        self._clients = Clients(config.idle_timeout_s)
        self._object_stores = ObjectStores(config.idle_timeout_s)

    def cached(self, address: Address) -> Path | None:
        """Where it lies on this machine although it is elsewhere, if its place must not be asked.

        Raises AdapterRejected when it does not lie there either.
        """
        return cached(address) if address.scheme == "hf" else None

    @asynccontextmanager
    async def open(self, address: Address, secret: Mapping[str, str]) -> AsyncIterator[Place]:
        """Raises AdapterRejected when it cannot be asked for with ``secret``."""
        if address.scheme == "hf":
            _check_keys(secret, ("token", "endpoint"), "hf://")
            async with HubRepository(self._policy, address, secret, self._clients, self._idle_timeout_s) as repository:
                yield repository
        elif address.scheme in ("https", "http"):
            authorization, query = _web_credentials(secret)
            async with Web(self._policy, address.url, self._clients, authorization, query) as web:
                yield web
        else:
            yield await in_thread(partial(self._object_stores.folder, address, secret))


def _web_credentials(secret: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The header ``Authorization`` and the query that ``secret`` asks for."""
    _check_keys(secret, ("token", "username", "password", "query"), "https://")
    query = secret.get("query", "").removeprefix("?") or None
    if "username" in secret:
        pair = f"{secret['username']}:{secret.get('password', '')}"
        return "Basic " + base64.b64encode(pair.encode()).decode(), query
    return f"Bearer {secret['token']}" if "token" in secret else None, query


def _check_keys(secret: Mapping[str, str], known: tuple[str, ...], scheme: str) -> None:
    unknown = sorted(set(secret) - set(known))
    if unknown:
        raise refused([f"the secret has {', '.join(map(repr, unknown))}; {scheme} takes {', '.join(known)}"])
