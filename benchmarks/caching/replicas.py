"""Replicas of ours without a model: loading and running are sleeps, who holds a slot is decided by the real code."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ray import serve

from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.slots import SlotTable
from adapter_router.engine.tiers import Tiers
from adapter_router.engine.transfer import Transfer
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, Classification, ReplicaLoad, Row, RowResult, ShardReply
from benchmarks.caching.tally import LOAD_S, RUN_S, SLOTS, Tally

_LOADERS = 2  # of one replica: our default
_OUTPUT: Classification = {"label": "", "score": 1.0, "probs": [1.0], "num_classes": 1}


@dataclass(eq=False)
class _Load:
    done: asyncio.Future[None]
    waiting: int = 0


class SleepingReplica:
    """Loads as our engine does: beside the running rows, a slot is taken when everything has been read.

    ``ours``: evicts as our engine does, and runs one batch at a time as a device does. Otherwise the least recently
    used goes, and every request runs at once by itself: what a peer gets at best.
    """

    def __init__(self, name: str, *, ours: bool) -> None:
        self.name = name
        self.tally = Tally()
        self._tiers = Tiers(SLOTS, 0, Transfer(torch.device("cpu")), EngineMetrics())
        if not ours:
            self._tiers.slots = SlotTable(SLOTS)
        self._loads: dict[str, _Load] = {}
        self._loaders = asyncio.Semaphore(_LOADERS)
        self._forwards = asyncio.Semaphore(1 if ours else 1 << 20)
        self._released = asyncio.Event()

    async def infer(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int) -> ShardReply:
        """One shard, as the dispatcher sends it."""
        adapters = [version.digest for version in versions if version]
        assert len(adapters) == len(rows)
        await self._run(Counter(adapters))
        results = [RowResult(_OUTPUT, np.zeros(1), adapter, adapter, 1) for adapter in adapters]
        return ShardReply(self.name, [*results], self._tiers.changes(known), ReplicaLoad(load_s=LOAD_S))

    async def answer(self, adapter: str) -> None:
        """One request for one adapter."""
        await self._run(Counter([adapter]))

    async def warm(self, adapter: str) -> None:
        """Have it there before rows come."""
        if not self._tiers.lease(adapter):
            await self._load(adapter).done  # it holds a lease for each who waits
        self._tiers.release(adapter)
        self._released.set()

    async def _run(self, uses: Counter[str]) -> None:
        for digest, count in uses.items():
            self._tiers.popularity.used(digest, count)
        leased = [digest for digest in uses if self._tiers.lease(digest)]
        self.tally.rows += uses.total()
        loads = {digest: self._load(digest) for digest in uses if digest not in leased}
        if leased:
            await self._forward(leased)
        for digest, load in loads.items():
            await load.done  # it holds a lease for each who waits
            await self._forward([digest])

    async def _forward(self, leased: Collection[str]) -> None:
        async with self._forwards:
            await asyncio.sleep(RUN_S)
        for digest in leased:
            self._tiers.release(digest)
        self._released.set()

    def _load(self, digest: str) -> _Load:
        if digest not in self._loads:
            self._loads[digest] = _Load(asyncio.ensure_future(self._bring_in(digest)))
        self._loads[digest].waiting += 1
        return self._loads[digest]

    async def _bring_in(self, digest: str) -> None:
        adapter = ResidentAdapter(digest, "text-classification", {}, {}, num_labels=1, num_bytes=1, max_rank=0)
        async with self._loaders:
            self.tally.loads[digest] += 1
            await asyncio.sleep(LOAD_S)
            self._tiers.popularity.loaded(digest, adapter.num_bytes, LOAD_S)
            while not self._tiers.install(adapter):
                self._released.clear()
                await self._released.wait()
        for _ in range(self._loads.pop(digest).waiting):
            self._tiers.lease(digest)


class Sleeping:
    """The same as a Ray Serve deployment."""

    def __init__(self, ours: bool) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._ours = ours
        self._replica = SleepingReplica(self._name, ours=ours)

    async def infer(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int) -> ShardReply:
        """One shard of ours."""
        return await self._replica.infer(rows, versions, known)

    async def answer(self, adapter: str) -> None:
        """One request of a peer."""
        await self._replica.answer(adapter)

    async def tally(self) -> Tally:
        """What was counted since the last ``forget``."""
        return self._replica.tally

    async def forget(self) -> None:
        """Start anew, as if just deployed."""
        self._replica = SleepingReplica(self._name, ours=self._ours)
