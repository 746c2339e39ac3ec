"""Rows in, outcomes out: forms batches, shards them over replicas, and carries a lost replica's rows elsewhere once."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InternalError, InvalidRequest, Overloaded, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.affinity import choose
from adapter_router.routing.batcher import Batcher, Waiting
from adapter_router.routing.demand import Demand
from adapter_router.routing.fleet import Fleet, ReplicaState
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult, ShardReply

logger = logging.getLogger(__name__)

BASE_SERIES = "__base__"
_POLL_S = 0.05  # how soon a change of the replica set is noticed while no reply comes in
_REPLACEMENT_S = 30.0  # how long rows of a lost replica wait for another before they trust the same one again


class Send(Protocol):
    """One call of one replica, whose residency is known up to ``known``. Raises ReplicaLost when it is gone."""

    async def __call__(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply: ...


@dataclass(frozen=True)
class _Shard:
    """Rows of one batch for one replica. Those of each ``cold`` adapter travel apart: none waits for another's load."""

    state: ReplicaState
    cold: str | None
    rows: list[Waiting]
    retried: bool = False


class Dispatcher:
    """Routes rows to the replicas that ``list_replicas`` names. Lives on one event loop; ``clock`` gives seconds."""

    def __init__(
        self,
        send: Send,
        list_replicas: Callable[[], Sequence[str]],
        config: RoutingConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fleet = Fleet()
        self._clock = clock
        self._send = send
        self._list_replicas = list_replicas
        self._config = config
        self._metrics = metrics
        self._batcher = Batcher(config.max_batch_rows, config.batch_wait_s)
        self._demand = Demand()
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        # In an empty context: a task made here would otherwise inherit the first caller's request id, and Ray would
        # cancel everybody's batches with that one request.
        self._loop = asyncio.get_running_loop().create_task(self._dispatch(), context=contextvars.Context())

    def __len__(self) -> int:
        """Rows that wait for a batch."""
        return len(self._batcher)

    async def close(self) -> None:
        """Stop dispatching; rows in flight are abandoned."""
        for task in (self._loop, *self._running):
            task.cancel()
        await asyncio.gather(self._loop, *self._running, return_exceptions=True)

    async def submit(self, rows: Sequence[tuple[Row, AdapterVersion | None]]) -> list[RowOutcome]:
        """Outcomes in the order of ``rows``. Cancelling the call drops those of its rows that have not left."""
        if len(rows) > self._config.max_queued_rows:
            limit = self._config.max_queued_rows
            self._metrics.errors.labels(InvalidRequest.code).inc(len(rows))
            return [InvalidRequest(f"{len(rows)} rows in one call, at most {limit} are taken") for _ in rows]
        if len(self._batcher) + len(rows) > self._config.max_queued_rows:
            self._metrics.errors.labels(Overloaded.code).inc(len(rows))
            return [Overloaded(f"{len(self._batcher)} rows are waiting; try again later") for _ in rows]
        now = self._clock()
        loop = asyncio.get_running_loop()
        waiting = [Waiting(row, version, now, loop.create_future()) for row, version in rows]
        for entry in waiting:
            self._batcher.put(entry)
        self._metrics.rows.inc(len(rows))
        self._wake.set()
        outcomes = await asyncio.gather(*(entry.answer for entry in waiting))
        self._account(waiting, outcomes, self._clock() - now)
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
            await self._step()

    async def _step(self) -> None:
        """Start a batch if one may leave, else wait for a reason to look again."""
        self._refresh()
        closes_in = self._batcher.closes_in(self._clock())
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
            async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may swallow a cancellation
                await self._wake.wait()
        except TimeoutError:
            return

    def _start(self, batch: Sequence[Waiting]) -> None:
        if not batch:
            return
        now = self._clock()
        for entry in batch:
            self._metrics.queue_seconds.observe(now - entry.arrived)
            if entry.digest is not None:
                self._demand.note(entry.digest, 1.0, now)
        shards = self._shards(batch)
        # Cold shards wait for their adapters and form a batch of their own.
        for cold in (False, True):
            rows = [entry for shard in shards if (shard.cold is not None) == cold for entry in shard.rows]
            if rows:
                self._metrics.batches.inc()
                self._metrics.batch_rows.observe(len(rows))
                self._metrics.batch_adapters.observe(len({entry.digest for entry in rows}))
        for shard in shards:
            self._spawn(shard)

    def _shards(self, batch: Sequence[Waiting], avoid: str | None = None, retried: bool = False) -> list[_Shard]:
        """Split ``batch`` by adapter and give each part its replica; parts of one replica travel together."""
        states = [state for state in self.fleet.states() if state.replica != avoid]
        now = self._clock()
        by_adapter: dict[str | None, list[Waiting]] = defaultdict(list)
        for entry in batch:
            by_adapter[entry.digest].append(entry)
        shards: dict[tuple[str, str | None], _Shard] = {}
        with ExitStack() as expected:  # each choice sees the ones before it; ``_spawn`` counts them for good
            for digest, entries in by_adapter.items():
                rate = self._demand.rate(digest, now) if digest else 0.0
                for start in range(0, len(entries), self._config.max_batch_rows):
                    part = entries[start : start + self._config.max_batch_rows]
                    state = choose(digest, len(part), states, self._config, rate)
                    cold = None if state.holds(digest) else digest
                    shards.setdefault((state.replica, cold), _Shard(state, cold, [], retried)).rows.extend(part)
                    state.sent(len(part), cold)
                    expected.callback(state.returned, len(part), cold)
        return list(shards.values())

    def _spawn(self, shard: _Shard) -> None:
        shard.state.sent(len(shard.rows), shard.cold)
        self._metrics.shards.inc()
        task = asyncio.get_running_loop().create_task(self._run(shard), context=contextvars.Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, shard: _Shard) -> None:
        """Send a shard and answer its rows, whatever happens."""
        lost = None
        try:
            await self._answer(shard)
        except ReplicaLost as error:
            lost = error
        except AdapterRouterError as error:
            _resolve(shard.rows, [error] * len(shard.rows))
        except Exception as error:
            logger.exception("replica %s failed on %d rows", shard.state.replica, len(shard.rows))
            _resolve(shard.rows, [InternalError(f"the replica failed: {type(error).__name__}")] * len(shard.rows))
        finally:
            shard.state.returned(len(shard.rows), shard.cold)
            self._wake.set()
            if lost is None:  # nothing is left to do here unless the call was cancelled
                _resolve(shard.rows, [InternalError("the call was cancelled")] * len(shard.rows))
        if lost is not None:
            await self._redispatch_or_fail(shard, lost)

    async def _answer(self, shard: _Shard) -> None:
        rows, versions, state = [e.row for e in shard.rows], [e.version for e in shard.rows], shard.state
        if shard.cold is not None:
            async with state.turn(shard.cold):
                reply = await self._send(state.replica, rows, versions, state.revision)
            row_s = None
        else:
            start = self._clock()
            reply = await self._send(state.replica, rows, versions, state.revision)
            row_s = (self._clock() - start) / len(shard.rows)
        if len(reply.outcomes) != len(shard.rows):
            raise InternalError(f"the replica answered {len(reply.outcomes)} of {len(shard.rows)} rows")
        self.fleet.observe(reply.replica, reply.residency, row_s, reply.load.load_s)
        _resolve(shard.rows, [_signed(outcome, reply.replica) for outcome in reply.outcomes])

    async def _redispatch_or_fail(self, shard: _Shard, lost: ReplicaLost) -> None:
        """As ``_start_or_fail``: whatever goes wrong on the way, nobody is left waiting."""
        try:
            await self._redispatch(shard, lost)
        except Exception:
            logger.exception("%d rows of lost replica %s cannot be sent again", len(shard.rows), shard.state.replica)
            _resolve(shard.rows, [lost] * len(shard.rows))

    async def _redispatch(self, shard: _Shard, error: ReplicaLost) -> None:
        """Send a lost replica's rows to another, once: inference has no side effects."""
        if shard.retried:
            _resolve(shard.rows, [error] * len(shard.rows))
            return
        self._metrics.retries.inc()
        avoid = await self._other_than(shard.state.replica)
        entries = [entry for entry in shard.rows if not entry.answer.done()]
        for again in self._shards(entries, avoid=avoid, retried=True):
            self._spawn(again)

    async def _other_than(self, replica: str | None) -> str | None:
        """Wait for a living replica besides ``replica``; None when that one comes back and stays the only one."""
        deadline = self._clock() + _REPLACEMENT_S
        while True:
            self._refresh()
            living = {state.replica for state in self.fleet.states()}
            if living - {replica}:
                return replica
            if living and self._clock() > deadline:
                return None
            await asyncio.sleep(_POLL_S)

    def _account(self, waiting: Sequence[Waiting], outcomes: Sequence[RowOutcome], seconds: float) -> None:
        for entry, outcome in zip(waiting, outcomes, strict=True):
            self._metrics.row_seconds.observe(seconds)
            self._metrics.adapter_rows.inc(entry.version.adapter if entry.version else BASE_SERIES)
            if not isinstance(outcome, RowResult):
                self._metrics.errors.labels(outcome.code).inc()


def _resolve(rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> None:
    for entry, outcome in zip(rows, outcomes, strict=True):
        if not entry.answer.done():
            entry.answer.set_result(outcome)


def _signed(outcome: RowOutcome, replica: str) -> RowOutcome:
    return replace(outcome, replica=replica) if isinstance(outcome, RowResult) else outcome
