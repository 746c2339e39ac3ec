"""Replica deployment: one engine on one device. No policy of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import transformers
from ray import serve

from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRouterError
from adapter_router.metrics import exposition
from adapter_router.types import AdapterVersion, BaseInfo, LoadReport, Row, ShardReply, TaskKind

MAX_CALLS = 256  # each in a thread: shards whose adapters are being loaded wait, forwards take turns
_STUCK_FORWARD_S = 60.0


class Replica:
    """Answers shards. Errors come back as values, so that their problems survive the journey."""

    def __init__(self, config: EngineConfig) -> None:
        # Heads that the base lacks are the adapters' business; transformers' report of them would alarm for nothing.
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine = Engine(config)
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="shard")
        self._probe = ThreadPoolExecutor(1, thread_name_prefix="health")

    async def infer(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None]) -> ShardReply:
        """One shard: outcomes in order."""
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._threads, self._engine.infer_versions, rows, versions)
        return ShardReply(self._name, outcomes, frozenset(self._engine.resident()), self._engine.load_s)

    async def admit(
        self, adapter: str, stored: StoredAdapter, task: TaskKind | None, labels: Sequence[str] | None
    ) -> LoadReport | AdapterRouterError:
        """Check a stored adapter against the base and make it resident here."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._engine.admit, adapter, stored, task, labels)
        except AdapterRouterError as error:
            return error

    async def evict(self, digest: str) -> None:
        """Free an idle adapter's device memory."""
        self._engine.evict(digest)

    async def info(self) -> BaseInfo:
        """The base this replica serves."""
        return self._engine.info()

    async def metrics_text(self) -> str:
        """This replica's metrics in Prometheus' text format."""
        return exposition(self._engine.metrics.registry)

    async def check_health(self) -> None:
        """Serve's health check: a forward that never ends makes the replica unhealthy."""
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._probe, self._engine.check_forward, _STUCK_FORWARD_S):
            raise RuntimeError(f"a forward pass has been running for more than {_STUCK_FORWARD_S} s")
