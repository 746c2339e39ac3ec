"""Router deployment: where rows of all tenants enter. Owns the catalog, the adapter store and the dispatcher."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import exceptions, serve
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from adapter_router.catalog.adapters import Catalog, each_version
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterNotFound, AdapterRejected, AdapterRouterError, InvalidRequest, ReplicaLost
from adapter_router.metrics import RouterMetrics, exposition, merged_exposition
from adapter_router.routing.dispatcher import Dispatcher
from adapter_router.types import AdapterVersion, BaseInfo, LoadReport, Row, RowOutcome, ShardReply, TaskKind
from deployments import replica_view

logger = logging.getLogger(__name__)

_LOST = (exceptions.RayActorError, exceptions.NodeDiedError, ReplicaUnavailableError)
_BY_VALUE_BYTES = 1 << 20  # Serve's by-value path is the faster one, and refuses messages of 4 MiB


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to register when the router starts."""

    name: str
    path: str
    task: TaskKind | None = None
    labels: tuple[str, ...] | None = None


class Router:
    """Methods are the handle's surface: ``serve.get_app_handle("adapter-router").infer.remote(row)``."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, replicas: DeploymentHandle, routing: RoutingConfig, store_dir: str, adapters: Sequence[AdapterSource]
    ) -> None:
        """Waits for a replica, then loads ``adapters``; those it must refuse are named in ``failures``."""
        self._replicas = replicas
        self._store = ContentStore(Path(store_dir))
        self._catalog = Catalog()
        self._metrics = RouterMetrics()
        self._base: BaseInfo = await replicas.info.remote()
        self._dispatcher = Dispatcher(self._send, self._living, routing, self._metrics)
        self.failures: dict[str, AdapterRouterError] = {}
        await asyncio.gather(*(self._load_declared(source) for source in adapters))

    # -- rows ----------------------------------------------------------------------------------------------------

    async def infer(self, row: Row) -> RowOutcome:
        """Answer one row; an error that concerns it is returned, not raised."""
        (outcome,) = await self.infer_many([row])
        return outcome

    async def infer_many(self, rows: Sequence[Row]) -> list[RowOutcome]:
        """Answer rows in order; an error stands in the place of the row it concerns."""
        found = each_version(rows, self.version_of)
        for version in found:
            if isinstance(version, AdapterRouterError):
                self._metrics.errors.labels(version.code).inc()
        known = [(row, v) for row, v in zip(rows, found, strict=True) if not isinstance(v, AdapterRouterError)]
        answered = iter(await self._dispatcher.submit(known) if known else ())
        return [v if isinstance(v, AdapterRouterError) else next(answered) for v in found]

    # -- adapters ------------------------------------------------------------------------------------------------

    async def load_adapter(
        self,
        name: str,
        path: str,
        task: TaskKind | None = None,
        labels: Sequence[str] | None = None,
        replace: bool = False,
    ) -> LoadReport | AdapterRouterError:
        """Copy the directory ``path`` into the store, check it on a replica, and register it as ``name``.

        From then on every replica, also one that starts later, can serve it. Returns the error when it is refused.
        """
        try:
            return await self._load(
                AdapterSource(name, path, task, tuple(labels) if labels is not None else None), replace
            )
        except AdapterRouterError as error:
            return error

    async def unload_adapter(self, name: str) -> AdapterVersion | AdapterRouterError:
        """Forget ``name``; rows already accepted finish."""
        try:
            version = self._catalog.remove(name)
        except AdapterNotFound as error:
            return error
        if not self._catalog.holds(version.digest):
            evictions = [self._call(replica, "evict", version.digest) for replica in self._living()]
            await asyncio.gather(*evictions, return_exceptions=True)  # a lost replica holds nothing any more
        return version

    async def models(self) -> tuple[BaseInfo, list[AdapterVersion]]:
        """The base and every registered adapter."""
        return self._base, self._catalog.versions()

    def version_of(
        self, adapter: str | Mapping[str, float] | None, head: str | None = None
    ) -> AdapterVersion | AdapterRouterError | None:
        """What answers rows that name ``adapter``, a mix too; None is the bare base."""
        if isinstance(adapter, Mapping):
            found = self._catalog.find(adapter, head)
            failed = [f"{name}: {self.failures[name]}" for name in adapter if name in self.failures]
            return AdapterRejected.because(failed) if failed and isinstance(found, AdapterNotFound) else found
        if adapter == self._base.name:
            adapter = None
        return self.failures.get(adapter or "") or self._catalog.find(adapter, head)

    # -- operation -----------------------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether rows can be answered now."""
        return bool(self._living())

    async def metrics_text(self) -> str:
        """Metrics of the whole application: this router's and every replica's, told apart by ``process``."""
        living = self._living()
        texts = await asyncio.gather(*(self._call(r, "metrics_text") for r in living), return_exceptions=True)
        named = {f"replica:{r}": text for r, text in zip(living, texts, strict=True) if isinstance(text, str)}
        return merged_exposition({"router": exposition(self._metrics.registry), **named})

    async def _load_declared(self, source: AdapterSource) -> None:
        try:
            await self._load(source, replace=True)
        except AdapterRouterError as error:
            logger.error("declared adapter %s cannot be served: %s", source.name, error)
            self.failures[source.name] = error

    async def _load(self, source: AdapterSource, replace: bool) -> LoadReport:
        """Copy, check on the replica that will be the adapter's home, register."""
        if source.name == self._base.name:
            raise InvalidRequest(f"{source.name!r} is the base model's name", "lora_name")
        self._catalog.check_name(source.name, replace=replace)
        stored = await asyncio.to_thread(self._store.admit, source.path)
        try:
            report = await self._admit_somewhere(source, stored)
            self._catalog.add(report.version, replace=replace)
        finally:
            self._store.settle(stored, keep=self._catalog.holds(stored.digest))
        self.failures.pop(source.name, None)
        return report

    async def _admit_somewhere(self, source: AdapterSource, stored: StoredAdapter) -> LoadReport:
        try:
            return await self._admit(source, stored)
        except ReplicaLost:
            return await self._admit(source, stored)

    async def _admit(self, source: AdapterSource, stored: StoredAdapter) -> LoadReport:
        replica = await self._dispatcher.home(stored.digest)
        report: LoadReport | AdapterRouterError = await self._call(
            replica, "admit", source.name, stored, source.task, source.labels
        )
        if isinstance(report, AdapterRouterError):
            raise report
        self._dispatcher.fleet.loaded(replica, stored.digest)
        return report

    def _living(self) -> tuple[str, ...]:
        return replica_view.replicas(self._replicas.app_name, self._replicas.deployment_name)

    async def _send(self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None]) -> ShardReply:
        by_reference = len(pickle.dumps((rows, versions))) > _BY_VALUE_BYTES
        reply: ShardReply = await self._call(replica, "infer", rows, versions, by_reference=by_reference)
        return reply

    async def _call(self, replica: str, method: str, *args: Any, by_reference: bool = False) -> Any:
        """Call one replica. Raises ReplicaLost when it is gone."""
        handle = self._replicas.options(method_name=method, session_id=replica, _by_reference=by_reference)
        try:
            return await handle.remote(*args)
        except _LOST as error:
            raise ReplicaLost(f"replica {replica} was lost; try again") from error


def current_router() -> Router:
    """The router of the deployment that is answering the current HTTP request."""
    router: Router = serve.get_replica_context().servable_object
    return router
