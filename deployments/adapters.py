"""What can be done with adapters: the catalog says what is meant, and the replicas of their bases follow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec, Alias, Registration, VersionRecord
from adapter_router.catalog.registrar import Registrar
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.sources.address import parse
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.errors import (
    AdapterNotFound,
    AdapterRouterError,
    AdapterUnavailable,
    CatalogUnavailable,
    InvalidRequest,
)
from adapter_router.types import AdapterVersion, LoadReport, Row
from deployments.bases import Bases
from deployments.holdings import Holdings
from deployments.pool import Pool

logger = logging.getLogger(__name__)

_FOLLOW_S = 0.2  # how soon another router's changes are seen
_COLD_S = 60.0  # how long a row waits for an adapter that is still being fetched or checked


class Adapters:
    """Every adapter of the application. Lives on the router's event loop."""

    def __init__(self, catalog: Catalog, store: ContentStore, fetcher: Fetcher, bases: Bases) -> None:
        self.catalog = catalog
        self.registrar = Registrar(catalog, fetcher, store, bases.check, self._follow, self._became_ready)
        self.holdings = Holdings(catalog, self.registrar, bases)
        self._bases = bases
        self._routes = Routes(catalog)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Follow the catalog and work on what is unfinished, from now on."""
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(self._keep_following()), loop.create_task(self.holdings.keep_aligned())]
        self.registrar.start()

    async def close(self) -> None:
        """Stop; nothing that the catalog knows is lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.registrar.close()

    # -- rows ----------------------------------------------------------------------------------------------------

    async def know(self, rows: Sequence[Row]) -> set[str]:
        """Have in memory what the adapters of ``rows`` mean; returns the names whose adapter is not servable yet."""
        names = {name for row in rows for name in self._names_of(row)}
        if missing := self._routes.missing(names):
            await self.registrar.read(self._routes.fetch, missing)
        return {name for name in names if self._is_pending(name)}

    def knows(self, row: Row) -> bool:
        """Whether ``know`` has nothing to look up for ``row``."""
        return not self._routes.missing(self._names_of(row))

    async def make_ready(self, names: Collection[str]) -> None:
        """Wait until each of ``names`` is servable or refused: ``version_of`` then says which."""
        outcomes = await asyncio.gather(*(self._make_ready(name) for name in names), return_exceptions=True)
        for error in outcomes:
            if isinstance(error, BaseException) and not isinstance(error, AdapterRouterError):
                raise error

    def version_of(
        self, adapter: str | Mapping[str, float] | None, head: str | None = None, sticky_key: str | None = None
    ) -> AdapterVersion | AdapterRouterError | None:
        """What answers rows that name ``adapter``, a mix too; None: the bare base. ``know`` comes before."""
        return self._routes.find(adapter, head, sticky_key)

    # -- adapters ------------------------------------------------------------------------------------------------

    async def register(self, spec: AdapterSpec, *, replace: bool = False) -> Registration:
        """Note an adapter; its files are fetched and checked in the background unless it is lazy.

        Raises AdapterExists unless ``replace``; InvalidRequest, AdapterRejected for what no source can make good.
        """
        self._bases.check_name(spec.name)
        if spec.base is not None:
            self._bases.meant(spec.base)
        parse(spec.source)
        registration = await self.registrar.register(spec, replace=replace)
        if replace:
            await self.holdings.unpin_versions(spec.name)
        return registration

    def check(self, declared: Iterable[AdapterSpec]) -> None:
        """Raise InvalidRequest with every declaration that nothing could make good."""
        problems = []
        for spec in declared:
            try:
                self._bases.check_name(spec.name)
                parse(spec.source)
            except AdapterRouterError as error:
                problems += [f"{spec.name}: {problem}" for problem in error.problems or (error.message,)]
        if problems:
            raise InvalidRequest("; ".join(problems), "adapters", problems)

    async def settled(self, name: str, timeout_s: float) -> Registration:
        """The registration of ``name`` once nothing more will happen to it by itself, or as it is after ``timeout_s``.

        A lazy one is started by this; a pinned or preloaded one is on the replicas. Raises AdapterNotFound.
        """
        try:
            registration = await self.registrar.ready(name, timeout_s)
        except AdapterUnavailable:
            return await self.registrar.read(self.catalog.registration, name)
        if registration.phase == "Ready" and (registration.spec.pinned or registration.spec.preload):
            await self.holdings.settle(name)
        return registration

    async def retry(self, name: str) -> Registration:
        """Fetch and check an adapter anew, in the background. Raises AdapterNotFound."""
        return await self.registrar.begin_again(name)

    async def retire(self, name: str, number: int) -> VersionRecord:
        """Take a version back. Raises AdapterNotFound; InvalidRequest while a name leads to it."""
        record = await self.registrar.write(self.catalog.retire, name, number)
        await self.holdings.free([record.version])
        return record

    async def load(self, spec: AdapterSpec, *, replace: bool = False) -> LoadReport:
        """Fetch, check, load and register an adapter at once; when it is refused nothing is registered."""
        self._bases.check_name(spec.name)
        report = await self.registrar.load(spec, replace=replace)
        if replace:
            await self.holdings.unpin_versions(spec.name)
        return report

    async def remove(self, name: str) -> list[AdapterVersion]:
        """Forget an adapter and all its versions; rows already accepted finish. Raises AdapterNotFound."""
        versions = await self.registrar.write(self.catalog.remove, name)
        await self.holdings.free(versions)
        return versions

    async def refresh(self, name: str, *, activate: bool | None = True) -> VersionRecord:
        """Look at the source again: what lies there now is a version, and meant from now on if ``activate``.

        None: if it was not known before.
        """
        record = await self.registrar.refresh(name, activate=activate)
        await self.holdings.settle_all([name])
        return record

    async def set_alias(self, name: str, weights: Mapping[str, int], expected: int | None = None) -> Alias:
        """Let ``name`` mean versions in shares. Raises InvalidRequest with every problem."""
        self._bases.check_name(name)
        return await self._flipped(await self.registrar.write(self.catalog.set_alias, name, weights, expected=expected))

    async def rollback(self, name: str) -> Alias:
        """Let ``name`` mean what it did before its last change."""
        return await self._flipped(await self.registrar.write(self.catalog.rollback, name))

    async def pin(self, name: str, pinned: bool) -> Registration:
        """Keep an adapter on all replicas' devices, or no longer. Raises AdapterNotFound, or why it does not fit."""
        before = await self.registrar.read(self.catalog.registration, name)
        registration = await self.registrar.write(self.catalog.pin, name, pinned)
        try:
            await self.holdings.settle(name)
        except AdapterRouterError:
            if pinned and not before.spec.pinned:
                await self.registrar.write(self.catalog.pin, name, False)
                await self.holdings.unpin_versions(name)
            raise
        return registration

    async def warm(self, name: str) -> list[tuple[str, AdapterVersion]]:
        """Load what ``name`` means on every replica of its base; returns the replicas and what each has now.

        Raises why the adapter cannot be served, or the first replica's reason not to load it.
        """
        await self._make_ready(name)
        meant = await self.holdings.meant(name)
        if not meant:
            await self.know([Row("", name)])
            error = self.version_of(name)
            raise error if isinstance(error, AdapterRouterError) else AdapterUnavailable(f"{name!r} has no version")
        loaded = []
        for version in meant:
            outcomes = await self.holdings.tell(version, "warm", version)
            loaded += [(replica, version) for replica in outcomes]
            for error in outcomes.values():
                if error is not None:
                    raise error
        return loaded

    async def _flipped(self, alias: Alias) -> Alias:
        """It has happened, whatever a replica says to it."""
        await self.holdings.settle_all({target.adapter for target in alias.targets})
        return alias

    # -- what the replicas hold ----------------------------------------------------------------------------------

    async def ask_replicas(self, method: str) -> dict[str, tuple[Pool, object]]:
        """What every replica of every base answers, by replica."""
        answers = await asyncio.gather(*(pool.ask_all(method) for pool in self._bases))
        return {r: (pool, a) for pool, asked in zip(self._bases, answers, strict=True) for r, a in asked.items()}

    # -- following the catalog -----------------------------------------------------------------------------------

    async def _make_ready(self, name: str) -> None:
        registration = await self.registrar.ready(name, _COLD_S)
        if registration.phase == "Ready" and self._is_pending(name):
            await self.registrar.retry(name, _COLD_S)
        if registration.spec.pinned or registration.spec.preload:
            await self.holdings.settle(name)

    async def _became_ready(self, registration: Registration) -> None:
        """A pinned or preloaded adapter is on all replicas as soon as it can be.

        Whether it is one is read anew: it may have been pinned while it was being fetched.
        """
        name = registration.spec.name
        with suppress(AdapterNotFound):
            now = (await self.registrar.read(self.catalog.registration, name)).spec
            if now.pinned or now.preload:
                await self.holdings.settle_all([name])

    def _names_of(self, row: Row) -> list[str]:
        """The names that the catalog must tell the meaning of: not those of bases."""
        return [name for name in names_of(row) if not self._bases.named(name)]

    def _is_pending(self, name: str) -> bool:
        """Whether rows for ``name`` have to wait for the registrar."""
        return self._routes.is_pending(name, self._bases.served)

    async def _follow(self) -> None:
        await self.registrar.read(self._routes.follow)

    async def _keep_following(self) -> None:
        while True:
            try:
                await self._follow()
            except CatalogUnavailable as error:
                logger.warning("the catalog cannot be followed: %s", error)
            except Exception:
                logger.exception("the catalog cannot be followed")
            await asyncio.sleep(_FOLLOW_S)


def names_of(row: Row) -> Iterable[str]:
    """The adapters that ``row`` names."""
    if isinstance(row.adapter, Mapping):
        return [name for name in row.adapter if isinstance(name, str)]
    return [] if row.adapter is None else [row.adapter]
