"""Router deployment: where rows of all tenants enter. Thin: adapters, bases and dispatchers do the work."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_router.catalog.addressing import each_version
from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.config import CatalogConfig, RoutingConfig
from adapter_router.errors import AdapterRouterError, CatalogUnavailable, DeadlineExceeded
from adapter_router.metrics import RouterMetrics, exposition, merged_exposition
from adapter_router.types import AdapterVersion, BaseInfo, LoadReport, Row, RowOutcome, Source, TaskKind
from deployments.adapters import Adapters, names_of
from deployments.autoscaling import router_report
from deployments.bases import Bases
from deployments.declared import Declared
from deployments.pool import Pool


class Router:
    """Methods are the handle's surface: ``serve.get_app_handle("adapter-router").infer.remote(row)``."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        replicas: Sequence[DeploymentHandle],
        routing: RoutingConfig,
        config: CatalogConfig,
        declared: Sequence[AdapterSpec],
        may_sleep: Collection[str] = (),
    ) -> None:
        """Waits for a replica of each base, and until what is ``declared`` is servable or refused.

        ``may_sleep``: deployments of bases that have no replica while nothing is asked of them.
        """
        self._metrics = RouterMetrics()
        pools = [await Pool.of(handle, routing, self._metrics) for handle in replicas]
        self.bases = Bases(pools)
        self._may_sleep = frozenset(may_sleep)
        self._metrics.queued.set_function(lambda: sum(len(pool.dispatcher) for pool in pools))
        url = config.url_of(serve.get_replica_context().app_name)
        catalog = await asyncio.to_thread(Catalog, url)
        store = ContentStore(Path(config.store_dir), config.max_adapter_bytes, config.store_bytes)
        self.adapters = Adapters(catalog, store, Fetcher(config.sources, store), self.bases)
        self.adapters.start()
        self.declared = Declared(self.adapters, declared, config.manifest)
        await self.declared.start()

    # -- rows ----------------------------------------------------------------------------------------------------

    async def infer(self, row: Row) -> RowOutcome:
        """Answer one row; an error that concerns it is returned, not raised."""
        (outcome,) = await self.infer_many([row])
        return outcome

    async def infer_many(self, rows: Sequence[Row], together: bool = False) -> list[RowOutcome]:
        """Answer rows in order; an error stands in the place of the row it concerns.

        Rows whose adapters must be fetched or checked first wait for those alone; the others do not wait for them.
        ``together``: rows of one base go to one replica where one holds all of their adapters; a text that several of
        them are asked about is tokenised once there.
        """
        try:
            pending = await self.adapters.know(rows)
        except CatalogUnavailable as error:
            return await self._answer_known(rows, error, together)
        if not pending:
            return await self._answer(rows, together)
        groups: defaultdict[tuple[frozenset[str], float | None], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            waits = frozenset(names_of(row)) & pending
            groups[waits, row.timeout_s if waits else None].append(index)
        answered = await asyncio.gather(
            *(
                self._answer_late([rows[index] for index in indices], waits, timeout_s, together)
                for (waits, timeout_s), indices in groups.items()
            )
        )
        outcomes = dict(
            pair
            for indices, group in zip(groups.values(), answered, strict=True)
            for pair in zip(indices, group, strict=True)
        )
        return [outcomes[index] for index in range(len(rows))]

    async def _answer_late(
        self, rows: Sequence[Row], pending: frozenset[str], timeout_s: float | None, together: bool
    ) -> list[RowOutcome]:
        """Answer rows once the ``pending`` names are ready, in what is left of the time that all of them have."""
        if not pending:
            return await self._answer(rows, together)
        start = time.monotonic()
        try:
            await self._make_ready(rows, pending, timeout_s)
        except CatalogUnavailable as error:
            return await self._answer_known(rows, error, together)
        except DeadlineExceeded as late:
            self._metrics.errors.labels(late.code).inc(len(rows))
            return [late] * len(rows)
        if timeout_s is not None:
            rows = [replace(row, timeout_s=timeout_s - (time.monotonic() - start)) for row in rows]
        return await self._answer(rows, together)

    async def _answer_known(self, rows: Sequence[Row], error: CatalogUnavailable, together: bool) -> list[RowOutcome]:
        """Answer rows whose adapters are in memory; to the others, why the catalog cannot be asked."""
        known = [index for index, row in enumerate(rows) if self.adapters.knows(row)]
        answered = dict(zip(known, await self._answer([rows[index] for index in known], together), strict=True))
        self._metrics.errors.labels(error.code).inc(len(rows) - len(known))
        return [answered.get(index, error) for index in range(len(rows))]

    async def _answer(self, rows: Sequence[Row], together: bool) -> list[RowOutcome]:
        """Answer rows whose adapters are in memory, each on its own base."""
        outcomes: dict[int, RowOutcome] = {}
        groups: defaultdict[Pool, list[tuple[int, Row, AdapterVersion | None]]] = defaultdict(list)
        for index, (row, version) in enumerate(zip(rows, each_version(rows, self._find), strict=True)):
            pool = self._pool(row, version)
            if isinstance(pool, AdapterRouterError):
                self._metrics.errors.labels(pool.code).inc()
                outcomes[index] = pool
            else:
                assert not isinstance(version, AdapterRouterError)
                groups[pool].append((index, row, version))
        answered = await asyncio.gather(
            *(
                pool.dispatcher.submit([(row, version) for _, row, version in group], together=together)
                for pool, group in groups.items()
            )
        )
        for group, results in zip(groups.values(), answered, strict=True):
            outcomes.update({index: result for (index, _, _), result in zip(group, results, strict=True)})
        return [outcomes[index] for index in range(len(rows))]

    async def _make_ready(self, rows: Sequence[Row], pending: Collection[str], timeout_s: float | None) -> None:
        """Wait for the ``pending`` names of ``rows``. Raises DeadlineExceeded, CatalogUnavailable."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await self.adapters.make_ready(pending)
                await self.adapters.know(rows)
        except TimeoutError as error:
            if timeout_s is None or not limit.expired():
                raise
            names = ", ".join(sorted(pending))
            raise DeadlineExceeded(f"{names} could not be had within the {timeout_s:.3g} s that were left") from error

    def _pool(self, row: Row, version: AdapterVersion | AdapterRouterError | None) -> Pool | AdapterRouterError:
        if isinstance(version, AdapterRouterError):
            return version
        if version is not None:
            return self.bases.of(version)
        named = self.bases.named(row.adapter) if isinstance(row.adapter, str) else None
        return named or self.bases.first

    def _find(
        self, adapter: str | Mapping[str, float] | None, head: str | None, sticky_key: str | None
    ) -> AdapterVersion | AdapterRouterError | None:
        if isinstance(adapter, str) and self.bases.named(adapter):
            adapter = None
        return self.adapters.version_of(adapter, head, sticky_key)

    # -- adapters ------------------------------------------------------------------------------------------------

    async def load_adapter(
        self,
        name: str,
        path: str,
        task: TaskKind | None = None,
        labels: Sequence[str] | None = None,
        replace: bool = False,
        base: str | None = None,
    ) -> LoadReport | AdapterRouterError:
        """Fetch the adapter at ``path`` (a directory or a URI), check it, load it and register it as ``name``.

        From then on every replica, also one that starts later, can serve it. Returns the error when it is refused.
        """
        spec = AdapterSpec(name, Source(path), base, task, tuple(labels) if labels is not None else None)
        try:
            return await self.adapters.load(spec, replace=replace)
        except AdapterRouterError as error:
            return error

    async def unload_adapter(self, name: str) -> list[AdapterVersion] | AdapterRouterError:
        """Forget ``name`` and its versions; rows already accepted finish."""
        try:
            return await self.adapters.remove(name)
        except AdapterRouterError as error:
            return error

    async def version_of(self, row: Row) -> AdapterVersion | AdapterRouterError | None:
        """What answers a row like ``row``; None is the bare base."""
        try:
            if pending := await self.adapters.know([row]):
                await self._make_ready([row], pending, row.timeout_s)
        except CatalogUnavailable as error:
            if not self.adapters.knows(row):
                return error
        except DeadlineExceeded as error:
            return error
        return self._find(row.adapter, row.head, row.sticky_key)

    def base_of(self, row: Row) -> BaseInfo:
        """The base that a row without an adapter goes to."""
        pool = self._pool(row, None)
        assert isinstance(pool, Pool)
        return pool.base

    # -- operation -----------------------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether rows can be answered now, on every base that is not asleep."""
        return all(pool.living() or pool.deployment in self._may_sleep for pool in self.bases)

    async def metrics_text(self) -> str:
        """Metrics of the whole application: this router's and every replica's, told apart by ``process``."""
        texts = await self.adapters.ask_replicas("metrics_text")
        named = {f"replica:{replica}": text for replica, (_, text) in texts.items() if isinstance(text, str)}
        return merged_exposition({"router": exposition(self._metrics.registry), **named})

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller hears of this router: numbers for ``deployments.autoscaling``."""
        return router_report({pool.deployment: pool.dispatcher.load() for pool in self.bases})


def current_router() -> Router:
    """The router of the deployment that is answering the current HTTP request."""
    router: Router = serve.get_replica_context().servable_object
    return router
