"""Rows in, outcomes out: forms batches, shards them over replicas, and carries a lost replica's rows elsewhere once."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InternalError, Overloaded, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.affinity import choose
from adapter_router.routing.batcher import Batcher, Waiting
from adapter_router.routing.fleet import Fleet
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult, ShardReply

logger = logging.getLogger(__name__)

BASE_SERIES = "__base__"
_POLL_S = 0.05  # how soon a change of the replica set is noticed while no reply comes in
_REPLACEMENT_S = 30.0  # how long rows of a lost replica wait for another before they trust the same one again


class Send(Protocol):
    """One call of one replica. Raises ReplicaLost when the replica is gone."""

    async def __call__(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None]
    ) -> ShardReply: ...


@dataclass(frozen=True)
class _Shard:
    """Rows of one batch for one replica. Cold rows travel apart: nobody waits for another's adapter to load."""

    replica: str
    cold: bool
    rows: list[Waiting]
    retried: bool = False


class Dispatcher:
    """Routes rows to the replicas that ``list_replicas`` names. Lives on one event loop."""

    def __init__(
        self, send: Send, list_replicas: Callable[[], Sequence[str]], config: RoutingConfig, metrics: RouterMetrics
    ) -> None:
        self.fleet = Fleet()
        self._send = send
        self._list_replicas = list_replicas
        self._config = config
        self._metrics = metrics
        self._batcher = Batcher(config.max_batch_rows, config.batch_wait_s)
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        # In an empty context: a task made here would otherwise inherit the first caller's request id, and Ray would
        # cancel everybody's batches with that one request.
        self._loop = asyncio.get_running_loop().create_task(self._dispatch(), context=contextvars.Context())

    async def close(self) -> None:
        """Stop dispatching; rows in flight are abandoned."""
        for task in (self._loop, *self._running):
            task.cancel()
        await asyncio.gather(self._loop, *self._running, return_exceptions=True)

    async def submit(self, rows: Sequence[tuple[Row, AdapterVersion | None]]) -> list[RowOutcome]:
        """Outcomes in the order of ``rows``. Cancelling the call drops those of its rows that have not left."""
        if len(self._batcher) + len(rows) > self._config.max_queued_rows:
            self._metrics.errors.labels(Overloaded.code).inc(len(rows))
            return [Overloaded(f"{len(self._batcher)} rows are waiting; try again later") for _ in rows]
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        waiting = [Waiting(row, version, now, loop.create_future()) for row, version in rows]
        for entry in waiting:
            self._batcher.put(entry)
        self._metrics.rows.inc(len(rows))
        self._wake.set()
        outcomes = await asyncio.gather(*(entry.answer for entry in waiting))
        self._account(waiting, outcomes, time.monotonic() - now)
        return outcomes

    async def home(self, digest: str) -> str:
        """The replica that should load an adapter nobody holds yet; waits for one to live."""
        await self._other_than(None)
        return choose(digest, 1, self.fleet.states(), self._config).replica

    def _refresh(self) -> None:
        self.fleet.sync(self._list_replicas())

    async def _dispatch(self) -> None:
        while True:
            self._wake.clear()
            self._refresh()
            self._metrics.queued.set(len(self._batcher))
            closes_in = self._batcher.closes_in(time.monotonic())
            free = self.fleet.free(self._config.calls_per_replica)
            if closes_in == 0.0 and free:
                self._start_or_fail(self._batcher.take(len(free)))
            else:
                await self._sleep(closes_in if free else _POLL_S)

    def _start_or_fail(self, batch: Sequence[Waiting]) -> None:
        """A fault of ours costs one batch, never the loop that everybody's rows depend on."""
        try:
            self._start(batch)
        except Exception:
            logger.exception("a batch of %d rows cannot be dispatched", len(batch))
            _resolve(batch, [InternalError("the batch cannot be dispatched")] * len(batch))

    async def _sleep(self, seconds: float | None) -> None:
        """Until something happens, at most ``seconds``; None: while no row waits."""
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return

    def _start(self, batch: Sequence[Waiting]) -> None:
        if not batch:
            return
        now = time.monotonic()
        for entry in batch:
            self._metrics.queue_seconds.observe(now - entry.arrived)
        shards = self._shards(batch)
        # Cold shards wait for their adapters and form a batch of their own.
        for cold in (False, True):
            rows = [entry for shard in shards if shard.cold == cold for entry in shard.rows]
            if rows:
                self._metrics.batches.inc()
                self._metrics.batch_rows.observe(len(rows))
                self._metrics.batch_adapters.observe(len({entry.digest for entry in rows}))
        for shard in shards:
            self._spawn(shard)

    def _shards(self, batch: Sequence[Waiting], avoid: str | None = None, retried: bool = False) -> list[_Shard]:
        """Split ``batch`` by adapter and give each part its replica; parts of one replica travel together."""
        states = [state for state in self.fleet.states() if state.replica != avoid]
        by_adapter: dict[str | None, list[Waiting]] = defaultdict(list)
        for entry in batch:
            by_adapter[entry.digest].append(entry)
        placed: dict[tuple[str, bool], list[Waiting]] = defaultdict(list)
        for digest, entries in by_adapter.items():
            for start in range(0, len(entries), self._config.max_batch_rows):
                part = entries[start : start + self._config.max_batch_rows]
                state = choose(digest, len(part), states, self._config)
                state.rows += len(part)  # the next choice sees this one; ``sent`` counts it for good
                placed[state.replica, not state.holds(digest)].extend(part)
        shards = [_Shard(replica, cold, entries, retried) for (replica, cold), entries in placed.items()]
        for state in states:
            state.rows -= sum(len(shard.rows) for shard in shards if shard.replica == state.replica)
        return shards

    def _spawn(self, shard: _Shard) -> None:
        self.fleet.sent(shard.replica, len(shard.rows), cold=shard.cold)
        self._metrics.shards.inc()
        task = asyncio.get_running_loop().create_task(self._run(shard), context=contextvars.Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, shard: _Shard) -> None:
        start = time.monotonic()
        try:
            reply = await self._send(
                shard.replica, [entry.row for entry in shard.rows], [entry.version for entry in shard.rows]
            )
        except ReplicaLost as error:
            self._give_back(shard)
            await self._redispatch(shard, error)
        except AdapterRouterError as error:
            self._give_back(shard)
            _resolve(shard.rows, [error] * len(shard.rows))
        except Exception as error:
            logger.exception("replica %s failed on %d rows", shard.replica, len(shard.rows))
            self._give_back(shard)
            _resolve(shard.rows, [InternalError(f"the replica failed: {type(error).__name__}")] * len(shard.rows))
        else:
            self._give_back(shard)
            row_s = None if shard.cold else (time.monotonic() - start) / len(shard.rows)
            self.fleet.observe(shard.replica, reply.resident, row_s, reply.load_s)
            _resolve(shard.rows, [_signed(outcome, shard.replica) for outcome in reply.outcomes])

    def _give_back(self, shard: _Shard) -> None:
        self.fleet.returned(shard.replica, len(shard.rows), cold=shard.cold)
        self._wake.set()

    async def _redispatch(self, shard: _Shard, error: ReplicaLost) -> None:
        """Send a lost replica's rows to another, once: inference has no side effects."""
        if shard.retried:
            _resolve(shard.rows, [error] * len(shard.rows))
            return
        self._metrics.retries.inc()
        avoid = await self._other_than(shard.replica)
        entries = [entry for entry in shard.rows if not entry.answer.done()]
        for again in self._shards(entries, avoid=avoid, retried=True):
            self._spawn(again)

    async def _other_than(self, replica: str | None) -> str | None:
        """Wait for a living replica besides ``replica``; None when that one comes back and stays the only one."""
        deadline = time.monotonic() + _REPLACEMENT_S
        while True:
            self._refresh()
            living = {state.replica for state in self.fleet.states()}
            if living - {replica}:
                return replica
            if living and time.monotonic() > deadline:
                return None
            await asyncio.sleep(_POLL_S)

    def _account(self, waiting: Sequence[Waiting], outcomes: Sequence[RowOutcome], seconds: float) -> None:
        for entry, outcome in zip(waiting, outcomes, strict=True):
            self._metrics.row_seconds.observe(seconds)
            self._metrics.adapter_rows.inc(entry.row.adapter or BASE_SERIES)
            if not isinstance(outcome, RowResult):
                self._metrics.errors.labels(outcome.code).inc()


def _resolve(rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> None:
    for entry, outcome in zip(rows, outcomes, strict=True):
        if not entry.answer.done():
            entry.answer.set_result(outcome)


def _signed(outcome: RowOutcome, replica: str) -> RowOutcome:
    return replace(outcome, replica=replica) if isinstance(outcome, RowResult) else outcome
