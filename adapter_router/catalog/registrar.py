"""Takes registrations through fetching and validation, each on its own: a slow or broken source delays nobody else.

Several routers may share a catalog: a claim makes sure that one of them works on a registration, and what a router that
died has left behind is taken up by the others.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec, Registration, VersionRecord
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRouterError,
    AdapterUnavailable,
    CatalogUnavailable,
    InternalError,
)
from adapter_router.types import LoadReport, Source

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_CLAIM_S = 30.0
_LOOK_S = 1.0  # how soon work that another router left behind is noticed
_FETCHES = 64
_FETCHES_PER_HOST = 8  # one host that hangs must not hold every thread
_AT_ONCE = 256  # registrations in hand; those that wait for their host's turn among them
_FIRST_RETRY_S = 5.0
_LAST_RETRY_S = 600.0

Check = Callable[[AdapterSpec, StoredAdapter, bool], Awaitable[LoadReport]]
"""Validates a stored adapter on its base; the last argument: and make it resident. Raises AdapterRouterError."""


class Registrar:
    """The work between "registered" and "ready". Lives on one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        fetcher: Fetcher,
        store: ContentStore,
        check: Check,
        changed: Callable[[], Awaitable[None]],
        became_ready: Callable[[Registration], Awaitable[None]] | None = None,
    ) -> None:
        """``changed`` is awaited after every write, so that this process sees what it wrote at once.

        ``became_ready``: of a registration that was worked on here, before anybody who waits for it goes on.
        """
        self._catalog = catalog
        self._fetcher = fetcher
        self._store = store
        self._check = check
        self._changed = changed
        self._became_ready = became_ready
        self._owner = uuid.uuid4().hex
        self._database = ThreadPoolExecutor(4, thread_name_prefix="catalog")
        self._fetching = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_FETCHES_PER_HOST))
        self._in_hand: dict[str, asyncio.Task[Registration]] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Work on whatever is unfinished, from now on."""
        self._loop = asyncio.get_running_loop().create_task(self._work_on_unfinished())

    async def close(self) -> None:
        """Stop; what is unfinished stays so in the catalog."""
        tasks = [task for task in (self._loop, *self._in_hand.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._database.shutdown(wait=False, cancel_futures=True)

    # -- registrations -------------------------------------------------------------------------------------------

    async def register(self, spec: AdapterSpec, *, replace: bool = False, managed: bool = False) -> Registration:
        """Note ``spec`` in the catalog and, unless it is lazy, start working on it.

        Raises AdapterExists unless ``replace``, InvalidRequest.
        """
        registration = await self.write(self._catalog.register, spec, replace=replace, managed=managed)
        if not spec.lazy:
            self._take_in_hand(spec.name)
        return registration

    async def load(self, spec: AdapterSpec, *, replace: bool = False) -> LoadReport:
        """Fetch, validate, make resident and register ``spec``; when it is refused nothing is registered.

        Raises AdapterExists unless ``replace``, or why the adapter cannot be served.
        """
        await self.read(self._catalog.check_name, spec.name, replace=replace)
        stored = await self._fetch(spec.source)
        kept = False
        try:
            report = _sourced(await self._check(spec, stored, True), spec.source)
            await self.write(self._catalog.register_version, spec, report.version, replace=replace)
            kept = True
        finally:
            self._store.settle(stored, keep=kept)
        return report

    async def refresh(self, name: str, *, activate: bool = True) -> VersionRecord:
        """Look at an adapter's source again; what lies there now is its version from now on if ``activate``.

        The same content is the same version. Raises why it cannot be had or served; then nothing changes.
        """
        registration = await self.read(self._catalog.registration, name)
        spec = registration.spec
        stored = await self._fetch(spec.source)
        kept = False
        try:
            report = _sourced(await self._check(spec, stored, False), spec.source)
            record = await self.write(self._catalog.add_version, name, report.version, activate=activate)
            kept = True
        finally:
            self._store.settle(stored, keep=kept)
        return record

    async def ready(self, name: str, timeout_s: float | None = None) -> Registration:
        """The registration of ``name`` once nothing more will happen to it by itself: Ready, Failed or Retired.

        A lazy one is started by this. Raises AdapterNotFound; AdapterUnavailable after ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    registration = await self.read(self._catalog.registration, name)
                    if registration.phase in ("Ready", "Failed", "Retired"):
                        return registration
                    task = self._take_in_hand(name)
                    await (asyncio.shield(task) if task else asyncio.sleep(_LOOK_S))
        except TimeoutError as error:
            raise AdapterUnavailable(f"adapter {name!r} is still being fetched or checked; try again later") from error

    async def retry(self, name: str, timeout_s: float | None = None) -> Registration:
        """Fetch and check an adapter anew, whatever its phase, and wait as ``ready`` does."""
        await self.begin_again(name)
        return await self.ready(name, timeout_s)

    async def begin_again(self, name: str) -> Registration:
        """Fetch and check an adapter anew, whatever its phase, in the background. Raises AdapterNotFound."""
        registration = await self.write(self._catalog.set_phase, name, "Registered")
        self._take_in_hand(name)
        return registration

    # -- the catalog from an event loop ----------------------------------------------------------------------------

    async def read(self, method: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call one of the catalog's methods in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._database, lambda: method(*args, **kwargs))

    async def write(self, method: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """``read``, and let this process know what changed."""
        result = await self.read(method, *args, **kwargs)
        await self._changed()
        return result

    # -- the work ------------------------------------------------------------------------------------------------

    async def _work_on_unfinished(self) -> None:
        while True:
            try:
                room = _AT_ONCE - len(self._in_hand)
                for name in await self.read(self._catalog.unfinished, room) if room > 0 else ():
                    self._take_in_hand(name)
            except Exception:
                logger.exception("the catalog cannot be read")
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
                self._wake.clear()
            except TimeoutError:
                continue

    def _take_in_hand(self, name: str) -> asyncio.Task[Registration] | None:
        """The work on ``name``, begun now if nobody here has; None when all hands are full."""
        if name not in self._in_hand:
            if len(self._in_hand) >= _AT_ONCE:
                return None
            # In an empty context: Ray would otherwise tie the work to the request that happened to begin it.
            task = asyncio.get_running_loop().create_task(self._finish(name), context=contextvars.Context())
            self._in_hand[name] = task
            task.add_done_callback(lambda done: self._put_down(name, done))
        return self._in_hand[name]

    def _put_down(self, name: str, task: asyncio.Task[Registration]) -> None:
        del self._in_hand[name]
        if len(self._in_hand) == _AT_ONCE - 1:
            self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("registration %s cannot be worked on: %s", name, error)

    async def _finish(self, name: str) -> Registration:
        """Fetch and check ``name`` and note how it went, unless another router is at it."""
        while not await self.read(self._catalog.claim, name, self._owner, _CLAIM_S):
            registration = await self.read(self._catalog.registration, name)
            if registration.phase in ("Ready", "Failed", "Retired"):
                return registration
            await asyncio.sleep(_LOOK_S)
        renewal = asyncio.get_running_loop().create_task(self._keep_claim(name))
        try:
            return await self._advance(name)
        finally:
            renewal.cancel()
            await self.read(self._catalog.release, name, self._owner)

    async def _keep_claim(self, name: str) -> None:
        while True:
            await asyncio.sleep(_CLAIM_S / 3)
            await self.read(self._catalog.claim, name, self._owner, _CLAIM_S)

    async def _advance(self, name: str) -> Registration:
        registration = await self.read(self._catalog.registration, name)
        if registration.phase in ("Ready", "Retired"):
            return registration  # whoever had the claim before us has done it
        spec = registration.spec
        stored: StoredAdapter | None = None
        kept = False
        try:
            await self.write(self._catalog.set_phase, name, "Fetching", source=spec.source)
            stored = await self._fetch(spec.source)
            await self.write(self._catalog.set_phase, name, "Validating", source=spec.source)
            report = _sourced(await self._check(spec, stored, False), spec.source)
            await self.write(self._catalog.add_version, name, report.version)
            kept = True
        except (AdapterConflict, AdapterNotFound):
            logger.info("registration %s was replaced or removed meanwhile", name)
        except CatalogUnavailable:
            raise  # whoever finds it unfinished takes it up
        except AdapterRouterError as error:
            await self._fail(registration, error)
        except Exception as error:
            logger.exception("registering %s failed", name)
            await self._fail(registration, InternalError(f"it failed for a fault of ours: {type(error).__name__}"))
        finally:
            if stored is not None:
                self._store.settle(stored, keep=kept)
        if kept and self._became_ready is not None:
            await self._became_ready(registration)
        return await self.read(self._catalog.registration, name)

    async def _fail(self, registration: Registration, error: AdapterRouterError) -> None:
        name, attempts = registration.spec.name, registration.attempts + 1
        pause = min(_FIRST_RETRY_S * 2 ** (attempts - 1), _LAST_RETRY_S) * random.uniform(0.8, 1.2)
        retry_at = time.time() + pause if error.retryable else None
        logger.warning("adapter %s cannot be served: %s", name, error)
        more = {"error": error, "retry_at": retry_at, "attempts": attempts, "source": registration.spec.source}
        await self.write(self._catalog.set_phase, name, "Failed", **more)

    async def _fetch(self, source: Source) -> StoredAdapter:
        async with self._hosts[urlsplit(source.uri).netloc]:
            return await asyncio.get_running_loop().run_in_executor(self._fetching, self._fetcher.fetch, source)


def _sourced(report: LoadReport, source: Source) -> LoadReport:
    return replace(report, version=replace(report.version, source=source))
