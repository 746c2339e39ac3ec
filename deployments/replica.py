"""Replica deployment: one engine on one device. No policy of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import transformers
from ray import serve

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import CatalogConfig, EngineConfig
from adapter_router.engine import Engine
from adapter_router.engine.callers import Callers
from adapter_router.engine.loading import SWITCH_INTERVAL_S
from adapter_router.errors import AdapterRouterError
from adapter_router.metrics import exposition
from adapter_router.types import (
    AdapterVersion,
    BaseInfo,
    Capacity,
    HeldAdapter,
    LoadReport,
    ReplicaLoad,
    Row,
    ShardReply,
)
from deployments.autoscaling import replica_report

logger = logging.getLogger(__name__)

MAX_CALLS = 256  # each in a thread: shards whose adapters are being loaded wait, forwards take turns
_STUCK_FORWARD_S = 60.0


class Replica:
    """Answers shards. Errors come back as values, so that their problems survive the journey."""

    def __init__(self, config: EngineConfig, catalog: CatalogConfig) -> None:
        """Ready once every adapter of the catalog that asks for it is resident."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # Heads that the base lacks are the adapters' business; transformers' report of them would alarm for nothing.
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._rows = 0
        store = ContentStore(catalog.store_dir, catalog.max_adapter_bytes, catalog.store_bytes)
        self._fetcher = Fetcher(catalog.sources, store)
        self._engine = Engine(config, self._fetcher.obtain)
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="shard")
        self._probe = ThreadPoolExecutor(1, thread_name_prefix="health")
        self._preload(catalog.url_of(context.app_name))

    async def infer(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int) -> ShardReply:
        """One shard: outcomes in order, and what has changed on the device since ``known``.

        A row whose ``timeout_s``, from now on, is over before the model is free for it is DeadlineExceeded. When the
        call is cancelled, those of its rows that are not being computed are left alone.
        """
        callers = Callers(rows)
        self._rows += len(rows)
        try:
            outcomes = await self._in_thread(self._engine.infer_versions, rows, versions, callers.gone)
        finally:
            callers.hang_up()  # a thread cannot be stopped: it is told instead, and asks before every forward
            self._rows -= len(rows)
        return ShardReply(self._name, outcomes, self._engine.changes(known), self.load())

    def load(self) -> ReplicaLoad:
        """How busy this replica is, whoever sends it rows."""
        return replace(self._engine.load(), rows=self._rows)

    async def admit(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport | AdapterRouterError:
        """Check a stored adapter against the base; ``resident``: and load it here."""
        try:
            report: LoadReport = await self._in_thread(self._admit, spec, stored, resident)
            return report
        except AdapterRouterError as error:
            return error

    async def warm(self, version: AdapterVersion) -> AdapterRouterError | None:
        """Load an adapter; returns what went wrong, if anything."""
        return await self._attempt(self._engine.warm, version)

    async def pin(self, version: AdapterVersion) -> AdapterRouterError | None:
        """Load an adapter and never evict it; returns what went wrong, if anything."""
        return await self._attempt(self._engine.pin, version)

    async def unpin(self, digests: Sequence[str]) -> None:
        """Let adapters be evicted again."""
        for digest in digests:
            self._engine.unpin(digest)

    async def evict(self, digest: str) -> None:
        """Free an idle adapter's memory."""
        self._engine.evict(digest)

    async def info(self) -> BaseInfo:
        """The base this replica serves."""
        return self._engine.info()

    async def residency(self) -> list[HeldAdapter]:
        """What is in this replica's memory."""
        return self._engine.residency()

    async def capacity(self) -> Capacity:
        """How much of this replica's memory is taken."""
        return self._engine.capacity()

    async def metrics_text(self) -> str:
        """This replica's metrics in Prometheus' text format."""
        return exposition(self._engine.metrics.registry)

    async def check_health(self) -> None:
        """Serve's health check: a forward that never ends makes the replica unhealthy."""
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._probe, self._engine.check_forward, _STUCK_FORWARD_S):
            raise RuntimeError(f"a forward pass has been running for more than {_STUCK_FORWARD_S} s")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller hears of this replica: numbers for ``deployments.autoscaling``."""
        return replica_report(self.load())

    def record_replica_metadata(self) -> dict[str, Any]:
        """What Serve tells every router of this replica, once.

        ``home``: an identity that the next replica in this one's place has, too. ``weight``: its memory for adapters.
        """
        # Serve gives the lowest free rank, so that a replica that is lost is followed by one of the same rank.
        rank = getattr(serve.get_replica_context(), "rank", None)
        home = self._name if rank is None else f"rank-{rank.rank}"
        return {"home": home, "weight": self._engine.config.adapter_memory_bytes}

    def _admit(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        if not stored.directory.is_dir():  # another node admitted it
            task = spec.task or "text-classification"  # the files say; here it is only a form to ask by
            version = AdapterVersion(spec.name, stored.digest, None, task, (), "none", source=spec.source)
            stored = self._fetcher.obtain(version)
        return self._engine.admit(spec.name, stored, spec.task, spec.labels, keep=resident)

    def _preload(self, url: str) -> None:
        """Load what the catalog wants on every replica; one that cannot be loaded is only reported."""
        catalog = Catalog(url)
        try:
            wanted = catalog.preloaded(self._engine.info().fingerprint)
        finally:
            catalog.close()
        loads = [self._threads.submit(self._engine.pin if pinned else self._engine.warm, v) for v, pinned in wanted]
        for (version, _), load in zip(wanted, loads, strict=True):
            if isinstance(error := load.exception(), AdapterRouterError):
                logger.error("preloading %s failed: %s", version.adapter, error)
            elif error is not None:
                raise error

    async def _attempt(
        self, method: Callable[[AdapterVersion], object], version: AdapterVersion
    ) -> AdapterRouterError | None:
        try:
            await self._in_thread(method, version)
        except AdapterRouterError as error:
            return error
        return None

    async def _in_thread(self, method: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, method, *args)
