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
from collections.abc import Awaitable, Callable
from dataclasses import replace

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.desk import Desk
from adapter_router.catalog.fetches import Fetches
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

_CLAIM_S = 30.0
_LOOK_S = 1.0  # how soon work that another router left behind is noticed
_UNASKED = 256  # registrations in hand that nobody waits for; those that wait for their place's turn among them
_AT_ONCE = 1024  # with those that somebody waits for: places that hang must not keep them from being begun
_FIRST_RETRY_S = 5.0
_LAST_RETRY_S = 600.0
_MOST_DOUBLINGS = 16  # floats end, attempts do not

Check = Callable[[AdapterSpec, StoredAdapter, bool], Awaitable[LoadReport]]
"""Validates a stored adapter on its base; the last argument: and make it resident. Raises AdapterRouterError."""


class Registrar(Desk):
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
        """``became_ready``: of a registration that was worked on here, before anybody who waits for it goes on.

        ``changed`` as in ``Desk``.
        """
        super().__init__(changed)
        self._catalog = catalog
        self._fetches = Fetches(fetcher, store)
        self._check = check
        self._became_ready = became_ready
        self._owner = uuid.uuid4().hex
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
        self._fetches.close()
        await super().close()

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
        async with self._fetches.copy(spec.source) as stored:
            report = _sourced(await self._check(spec, stored, True), spec.source)
            await self.write(self._catalog.register_version, spec, report.version, replace=replace)
        return report

    async def refresh(self, name: str, *, activate: bool | None = True) -> VersionRecord:
        """Look at an adapter's source again; what lies there now is its version from now on if ``activate``.

        The same content is the same version; None activates only what is new, so that a name keeps the meaning that
        somebody has given it. Raises why it cannot be had or served; then nothing changes.
        """
        registration = await self.read(self._catalog.registration, name)
        spec = registration.spec
        async with self._fetches.copy(spec.source) as stored:
            report = _sourced(await self._check(spec, stored, False), spec.source)
            more = {"activate": activate, "of": registration}
            return await self.write(self._catalog.add_version, name, report.version, **more)

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
                    task = self._take_in_hand(name, _AT_ONCE)
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

    # -- the work ------------------------------------------------------------------------------------------------

    async def _work_on_unfinished(self) -> None:
        while True:
            try:
                room = _UNASKED - len(self._in_hand)
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

    def _take_in_hand(self, name: str, most: int | None = None) -> asyncio.Task[Registration] | None:
        """The work on ``name``, begun now if nobody here has; None when ``most`` are in hand, by default _UNASKED."""
        if name not in self._in_hand:
            if len(self._in_hand) >= (_UNASKED if most is None else most):
                return None
            # In an empty context: Ray would otherwise tie the work to the request that happened to begin it.
            task = asyncio.get_running_loop().create_task(self._finish(name), context=contextvars.Context())
            self._in_hand[name] = task
            task.add_done_callback(lambda done: self._put_down(name, done))
        return self._in_hand[name]

    def _put_down(self, name: str, task: asyncio.Task[Registration]) -> None:
        del self._in_hand[name]
        if len(self._in_hand) == _UNASKED - 1:
            self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("registration %s cannot be worked on: %s", name, error)

    async def _finish(self, name: str) -> Registration:
        """Fetch and check ``name`` and note how it went, unless another router is at it."""
        while not await self.note(self._catalog.claim, name, self._owner, _CLAIM_S):
            registration = await self.read(self._catalog.registration, name)
            if registration.phase in ("Ready", "Failed", "Retired"):
                return registration
            await asyncio.sleep(_LOOK_S)
        renewal = asyncio.get_running_loop().create_task(self._keep_claim(name))
        try:
            return await self._advance(name)
        finally:
            renewal.cancel()
            await self._give_claim_back(name)

    async def _keep_claim(self, name: str) -> None:
        while True:
            await asyncio.sleep(_CLAIM_S / 3)
            try:
                await self.note(self._catalog.claim, name, self._owner, _CLAIM_S)
            except CatalogUnavailable as error:  # until it lapses there is time to try again
                logger.warning("the claim on %s cannot be prolonged: %s", name, error)

    async def _give_claim_back(self, name: str) -> None:
        try:
            await self.note(self._catalog.release, name, self._owner)
        except CatalogUnavailable as error:
            logger.warning("the claim on %s lapses by itself: %s", name, error)

    async def _advance(self, name: str) -> Registration:
        registration = await self.read(self._catalog.registration, name)
        if registration.phase in ("Ready", "Retired"):
            return registration  # whoever had the claim before us has done it
        spec = registration.spec
        try:
            await self.write(self._catalog.set_phase, name, "Fetching", of=registration)
            async with self._fetches.copy(spec.source) as stored:
                await self.write(self._catalog.set_phase, name, "Validating", of=registration)
                report = _sourced(await self._check(spec, stored, False), spec.source)
                await self.write(self._catalog.add_version, name, report.version, of=registration)
        except (AdapterConflict, AdapterNotFound):
            logger.info("registration %s was replaced, removed or finished by another meanwhile", name)
        except CatalogUnavailable:
            raise  # whoever finds it unfinished takes it up
        except AdapterRouterError as error:
            await self._fail(registration, error)
        except Exception as error:
            logger.exception("registering %s failed", name)
            await self._fail(registration, InternalError(f"it failed for a fault of ours: {type(error).__name__}"))
        else:
            if self._became_ready is not None:
                await self._became_ready(registration)
        return await self.read(self._catalog.registration, name)

    async def _fail(self, registration: Registration, error: AdapterRouterError) -> None:
        name, attempts = registration.spec.name, registration.attempts + 1
        retry_at = time.time() + _pause(attempts) if error.retryable else None
        logger.warning("adapter %s cannot be served: %s", name, error)
        more = {"error": error, "retry_at": retry_at, "attempts": attempts, "of": registration}
        await self.write(self._catalog.set_phase, name, "Failed", **more)


def _pause(attempts: int) -> float:
    """Seconds until what has failed so often is tried again."""
    doubled: float = _FIRST_RETRY_S * 2 ** min(attempts - 1, _MOST_DOUBLINGS)
    return min(doubled, _LAST_RETRY_S) * random.uniform(0.8, 1.2)


def _sourced(report: LoadReport, source: Source) -> LoadReport:
    return replace(report, version=replace(report.version, source=source))
