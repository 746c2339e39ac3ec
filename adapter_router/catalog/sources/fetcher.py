"""From a source to a private copy in the store, whatever kind of place it is."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from adapter_router.catalog.adapter_files import WEIGHTS, identity
from adapter_router.catalog.sources.address import Address, parse
from adapter_router.catalog.sources.download import Download
from adapter_router.catalog.sources.flights import Flights, alone
from adapter_router.catalog.sources.partial import Partial, tidy
from adapter_router.catalog.sources.place import Failing, Progress, RemoteFile, refused
from adapter_router.catalog.sources.places import Places
from adapter_router.catalog.sources.policy import LOCAL, Policy
from adapter_router.catalog.sources.secrets import Secret, Secrets
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import SourceConfig
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterRouterError, AdapterUnavailable
from adapter_router.types import AdapterVersion, Source

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Fetcher:
    """Fetches for one process; processes that share a store share downloads. Thread-safe; every method blocks."""

    def __init__(
        self,
        config: SourceConfig,
        store: ContentStore,
        secrets: Callable[[str], Mapping[str, str]] | None = None,
    ) -> None:
        """``secrets``: credentials by name; by default as ``Secrets``. Raises ValueError for wrong prefixes."""
        self.config = config
        self.store = store
        self._policy = Policy(config.allowed)
        self._secrets = secrets or Secrets(config.secrets_dir)
        self._flights = Flights(store)
        self._places = Places(self._policy, config)
        self._unfinished = store.work / "downloads"
        tidy(self._unfinished, store.budget_bytes)

    def fetch(self, source: Source, progress: Progress | None = None) -> StoredAdapter:
        """What lies at ``source`` now, as a copy in the store. The caller says with ``settle`` what became of it.

        Raises AdapterRejected with every problem when it cannot be had as asked, AdapterUnavailable when that may heal.
        """
        address = parse(source)
        here = self._policy.check(address) or self._places.cached(address)
        if here is not None:
            stored = self.store.admit(here, followed=address.scheme in LOCAL)
        else:
            key = _key(address, source)
            stored = self._flights.join(key, lambda: self._fetch_remote(address, source, key, progress))
        try:
            _check_pin(address, source.sha256, stored)
        except BaseException:
            self.store.settle(stored, keep=False)
            raise
        return stored

    def obtain(self, version: AdapterVersion) -> StoredAdapter:
        """The copy of ``version`` on this node, fetched when there is none; it stays while somebody has the answer.

        Raises AdapterFailed when its source no longer holds it, AdapterUnavailable.
        """
        found = self.store.find(version.digest)
        if found is not None:
            return found
        name = f"adapter {version.adapter!r}, version {version.digest}"
        if version.source is None:
            raise AdapterFailed(f"{name}: this node has no copy of it, and its source is not known; register it again")
        try:
            stored = self.fetch(replace(version.source, sha256=version.digest))
        except AdapterRejected as error:
            problems = "\n".join(f"  - {problem}" for problem in error.problems)
            raise AdapterFailed(
                f"{name}: this node has no copy of it, and its source no longer holds it:\n{problems}",
                None,
                error.problems,
            ) from None
        try:
            found = self.store.find(version.digest)
        finally:
            self.store.settle(stored, keep=True)
        if found is None:
            raise AdapterUnavailable(f"{name} went from the store as soon as it had come; try again")
        return found

    def fingerprint(self, source: Source) -> str:
        """Something else once what lies at ``source`` is another, without reading it all. Raises as ``fetch``."""
        address = parse(source)
        here = self._policy.check(address) or self._places.cached(address)
        if here is not None:
            return _fingerprint(identity(here))
        secret = self._secret(source)

        async def look() -> str:
            async with self._places.open(address, secret) as place:
                download = Download(place, Partial(self._unfinished / "none"), self.config, self.store.max_bytes)
                return _fingerprint_of(await download.look())

        return self._run(address, look())

    def _fetch_remote(self, address: Address, source: Source, key: str, progress: Progress | None) -> StoredAdapter:
        secret = self._secret(source)
        home = self._unfinished / key
        try:
            with alone(home, self.config.timeout_s):
                stored = self._run(address, self._download(address, secret, key, progress))
                Partial(home).forget()
                return stored
        except AdapterRouterError:
            tidy(self._unfinished, self.store.budget_bytes)
            raise

    async def _download(
        self, address: Address, secret: Mapping[str, str], key: str, progress: Progress | None
    ) -> StoredAdapter:
        async with self._places.open(address, secret) as place:
            partial = Partial(self._unfinished / key)
            download = Download(place, partial, self.config, self.store.max_bytes, progress)
            files = await download.look()
            if (known := self._seen(key, files)) is not None:
                return known
            self.store.make_room(sum(file.size or 0 for file in files.values()))
            digest = await download.run()
            stored = self.store.adopt(partial.files, digest)
            self.store.note_seen(key, _fingerprint_of(download.files), digest)
            return stored

    def _seen(self, key: str, files: Mapping[str, RemoteFile]) -> StoredAdapter | None:
        """The copy made when the source's files were these, if it is still there."""
        if not all(file.strong for file in files.values()):
            return None
        digest = self.store.seen(key, _fingerprint_of(files))
        found = self.store.find(digest) if digest is not None else None
        return found if found is not None and self.store.share(found) else None

    def _run(self, address: Address, work: Coroutine[Any, Any, _Result]) -> _Result:
        """``work`` within the time there is; its failures as errors that name ``address``."""
        try:
            return asyncio.run(_within(self.config.timeout_s, work))
        except Exception as error:
            failure = self._told(address, error)
        raise failure  # not from where the library's error, which may have credentials in it, would be its context

    def _told(self, address: Address, error: Exception) -> Exception:
        if isinstance(error, AdapterRejected):
            return refused(f"{address}: {problem}" for problem in error.problems)
        if isinstance(error, AdapterRouterError):
            return error
        if isinstance(error, Failing):
            return AdapterUnavailable(f"{address} cannot be fetched just now: {error}")
        if isinstance(error, TimeoutError):
            return AdapterUnavailable(
                f"{address} took longer than timeout_s, {self.config.timeout_s:g} s; what came is kept, and the next "
                "attempt goes on from there"
            )
        if isinstance(error, OSError):
            return AdapterUnavailable(
                f"{address} cannot be written to the store at {self.store.root}: "
                f"{error.strerror or type(error).__name__}; what came is kept, and the next attempt goes on from there"
            )
        where = "".join(traceback.format_tb(error.__traceback__))  # whatever a library throws
        logger.error("fetching %s failed: %s\n%s", address, type(error).__name__, where)
        return AdapterUnavailable(f"{address} cannot be fetched just now: {type(error).__name__}")

    def _secret(self, source: Source) -> Mapping[str, str]:
        return Secret({}) if source.secret_ref is None else Secret(self._secrets(source.secret_ref))


async def _within(seconds: float, work: Coroutine[Any, Any, _Result]) -> _Result:
    async with asyncio.timeout(seconds):
        return await work


def _check_pin(address: Address, pin: str | None, stored: StoredAdapter) -> None:
    if pin is None:
        return
    if pin.startswith("sha256:"):
        found, what = stored.digest, "an adapter of digest"
    else:
        found, what = hashlib.sha256(stored.read().weights).hexdigest(), f"{WEIGHTS} of sha256"
    if found != pin:
        raise refused([f"{address} holds {what} {found}, not the {pin} it must be; if that is intended change sha256"])


def _key(address: Address, source: Source) -> str:
    """One for what is the same download: with other credentials it may be another."""
    return hashlib.sha256(json.dumps([str(address), source.secret_ref]).encode()).hexdigest()[:32]


def _fingerprint_of(files: Mapping[str, RemoteFile]) -> str:
    return _fingerprint([(file.name, file.size, file.tag) for file in files.values()])


def _fingerprint(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
