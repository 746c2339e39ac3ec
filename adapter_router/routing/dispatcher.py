"""Rows in, outcomes out: each row gets a replica when it comes, waits in its lane, and leaves in a batch."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from adapter_router.config import RoutingConfig
from adapter_router.errors import InternalError
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.accounts import Accounts
from adapter_router.routing.affinity import Wanted, choose
from adapter_router.routing.calls import Call, Calls
from adapter_router.routing.fleet import Fleet, Member, ReplicaState
from adapter_router.routing.joining import Joining
from adapter_router.routing.lanes import Lane
from adapter_router.routing.pressure import Pressure, RouterLoad
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row, RowOutcome, ShardReply

logger = logging.getLogger(__name__)

_POLL_S = 0.05  # how soon a change of the replica set is noticed
_FADE_S = 0.5  # how often what other routers have under way counts less, if nothing is heard of it


class Replicas(Protocol):
    """The replicas of one base."""

    def members(self) -> Sequence[Member]:
        """Those that live."""

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply:
        """One call of one replica, whose residency is known up to ``known``. Raises ReplicaLost when it is gone."""

    async def warm(self, replica: str, version: AdapterVersion) -> None:
        """Have one replica load an adapter. Raises why it cannot."""


class Dispatcher:
    """Routes rows to replicas. Lives on one event loop; ``clock`` gives seconds."""

    def __init__(
        self,
        replicas: Replicas,
        config: RoutingConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int | None = None,
    ) -> None:
        """``max_tokens``: of one row, where the base has a limit."""
        self.fleet = Fleet()
        self._clock = clock
        self._replicas = replicas
        self._config = config
        self._metrics = metrics
        self._pressure = Pressure()
        self._joining = Joining(self.fleet, self._pressure.demand, replicas.warm, metrics)
        self._accounts = Accounts(config, metrics, self._pressure, clock, max_tokens)
        self._calls = Calls(replicas.send, self.fleet, self, config, metrics, clock)
        self._lanes: dict[str, Lane] = {}
        self._homeless: list[Waiting] = []  # rows that no replica lives for
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._follow())

    def __len__(self) -> int:
        """Rows that wait to be sent."""
        return len(self._homeless) + sum(map(len, self._lanes.values()))

    async def close(self) -> None:
        """Stop dispatching; rows in flight are abandoned."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._calls.close()

    async def submit(
        self, rows: Sequence[tuple[Row, AdapterVersion | None]], together: bool = False
    ) -> list[RowOutcome]:
        """Outcomes in the order of ``rows``; ``together``: from one replica where one has all their adapters.

        Cancelling the call takes back those of its rows that do not run yet.
        """
        entries = self._accounts.enter(rows)
        accepted = [entry for entry in entries if not entry.answer.done()]
        self._place(accepted, together)
        timers = self._timers(accepted)
        try:
            return await asyncio.gather(*(entry.answer for entry in entries))
        finally:
            for timer in timers:
                timer.cancel()
            gone = [entry for entry in accepted if entry.answer.cancelled()]
            self._accounts.cancelled(gone)
            self._take_back(gone)

    async def home(self, digest: str) -> str:
        """The replica that should load an adapter nobody holds yet; waits for one to live."""
        while (state := self._choice(digest, 1)) is None:
            self._pressure.came(0, self._clock())  # a base without a replica is woken for who waits here, too
            await asyncio.sleep(_POLL_S)
            self._sync()
        return state.replica

    def load(self) -> RouterLoad:
        """What the rows of just now ask of the replicas."""
        now = self._clock()
        arrivals = [lane.oldest for lane in self._lanes.values()] + [entry.arrived for entry in self._homeless]
        waited = max((now - arrived for arrived in arrivals if arrived is not None), default=0.0)
        return self._pressure.load(len(self), self._accounts.tokens, waited, now)

    # -- what becomes of calls: see ``calls.Owner`` --------------------------------------------------------------

    def finish(self, rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> None:
        """Answers; a row that was sent elsewhere as well is taken back there."""
        self._take_back(entry for entry in self._accounts.finish(rows, outcomes) if entry.lane or entry.attempts > 1)

    def again(self, rows: Sequence[Waiting], avoid: str) -> None:
        """Rows shall go to another replica than ``avoid``."""
        self._assign(rows, avoid)

    def suspected(self, state: ReplicaState) -> None:
        """What waits for a replica that does not answer goes elsewhere."""
        if (lane := self._lanes.get(state.replica)) is not None:
            self._move(lane.drain(), state.replica)

    def returned(self, call: Call) -> None:
        """A replica has room again, and an adapter that rows waited for has come, or not."""
        lane = self._lanes.get(call.state.replica)
        if lane is not None and lane.state is call.state:
            self._move(lane.returned(call))
            lane.wake.set()

    # -- replicas ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        heard = self._clock()
        while True:
            try:
                self._sync()
                self._calls.trust_again()
                if (now := self._clock()) - heard > _FADE_S:
                    self.fleet.fade(now - heard)
                    heard = now
                homeless, self._homeless = self._homeless, []
                self._assign(homeless)
            except Exception:
                logger.exception("the replicas cannot be followed")
            await asyncio.sleep(_POLL_S)

    def _sync(self) -> None:
        came, gone = self.fleet.sync(self._replicas.members())
        for state in came:
            lane = self._lanes[state.replica] = Lane(state, self.fleet, self._config)
            self._spawn(self._serve(lane))
            self._spawn(self._admit(lane))
        for state in gone:
            lane = self._lanes.pop(state.replica)
            lane.wake.set()
            self._move(lane.drain())

    async def _admit(self, lane: Lane) -> None:
        """Let a new replica have rows, once it holds what it will be asked for."""
        if any(other.admitted for other in self.fleet.states()):
            await self._joining.warm_up(lane.state, self._clock(), self._config.warm_up_s)
        self.fleet.admit(lane.state)
        lane.wake.set()

    async def _serve(self, lane: Lane) -> None:
        """Let rows leave while the replica lives."""
        while self._lanes.get(lane.state.replica) is lane:
            lane.wake.clear()
            try:
                self._leave(lane)
            except Exception:
                logger.exception("rows for replica %s cannot be sent", lane.state.replica)
                rows = lane.drain()
                self.finish(rows, [InternalError("the row cannot be sent")] * len(rows))
            await _sleep(lane.wake, lane.closes_in(self._clock()))

    def _leave(self, lane: Lane) -> None:
        now = self._clock()
        if not lane and not lane.state.rows and lane.state.choosable:
            self._relieve()
        while (call := lane.leave(now)) is not None:
            self._metrics.batches.inc()
            self._metrics.batch_rows.observe(len(call.rows))
            self._metrics.batch_adapters.observe(len({entry.digest for entry in call.rows}))
            for entry in call.rows:
                self._metrics.queue_seconds.observe(now - entry.arrived)
            self._calls.start(call)

    def _relieve(self) -> None:
        """Choose again for rows of the fullest lane: where they were meant to go was chosen before others came."""
        full = max(self._lanes.values(), key=lambda lane: lane.num_blocked)
        if full.num_blocked:
            self._move(full.some(self._config.max_batch_rows, self._clock()))

    # -- rows ----------------------------------------------------------------------------------------------------

    def _place(self, entries: Sequence[Waiting], together: bool) -> None:
        """A fault of ours costs the rows of one call, never those that wait already."""
        try:
            self._sync()
            self._note(entries)
            self._assign(entries, together=together)
        except Exception:
            logger.exception("%d rows cannot be dispatched", len(entries))
            self.finish(entries, [InternalError("the row cannot be dispatched")] * len(entries))

    def _note(self, entries: Sequence[Waiting]) -> None:
        now = self._clock()
        for members in _by_adapter(entries).values():
            if (version := members[0].version) is not None:
                self._pressure.asked(version, len(members), now)
                self._joining.note(version)

    def _assign(self, entries: Sequence[Waiting], avoid: str | None = None, together: bool = False) -> None:
        """Give each row a replica; rows of one adapter go together as far as they fit a batch."""
        groups = _by_adapter(entries)
        shared = self._holder_of_all(groups) if together else None
        for digest, members in groups.items():
            for start in range(0, len(members), self._config.max_batch_rows):
                part = members[start : start + self._config.max_batch_rows]
                version = part[0].version
                state = shared or self._choice(digest, len(part), version.num_bytes if version else 0, avoid)
                if state is None:
                    self._homeless += part
                    continue
                lane = self._lanes[state.replica]
                lane.put(part)
                lane.wake.set()

    def _choice(
        self, digest: str | None, rows: int, num_bytes: int = 0, avoid: str | None = None
    ) -> ReplicaState | None:
        rate = self._pressure.demand.rate(digest, self._clock()) if digest else 0.0
        wanted = Wanted(digest, rows, num_bytes, rate)
        state = choose(wanted, self.fleet, self._config, () if avoid is None else (avoid,))
        return None if state is None or self._calls.has_lost(state) else state

    def _holder_of_all(self, digests: Iterable[str | None]) -> ReplicaState | None:
        named = [digest for digest in digests if digest is not None]
        if len(named) < 2:
            return None
        holders = [s for s in self.fleet.copies(named[0]) if s.choosable and all(s.holds(each) for each in named)]
        return min(holders, key=lambda state: state.backlog_s, default=None)

    def _move(self, entries: Sequence[Waiting], avoid: str | None = None) -> None:
        """Choose again for rows that have been taken out of a lane."""
        for entry in entries:
            entry.lane = None
        self._assign([entry for entry in entries if not entry.answer.done()], avoid)

    def _take_back(self, entries: Iterable[Waiting]) -> None:
        """Nobody waits for these rows any more."""
        for entry in entries:
            lane = self._lanes.get(entry.lane or "")
            if not (lane is not None and lane.remove(entry)) and entry in self._homeless:
                self._homeless.remove(entry)
            self._calls.forsaken(entry)

    def _timers(self, entries: Sequence[Waiting]) -> list[asyncio.TimerHandle]:
        now, loop = self._clock(), asyncio.get_running_loop()
        groups: dict[float, list[Waiting]] = defaultdict(list)
        for entry in entries:
            groups[entry.deadline].append(entry)
        return [loop.call_later(max(0.0, at - now), self._expire, group) for at, group in groups.items()]

    def _expire(self, entries: Sequence[Waiting]) -> None:
        self._take_back(self._accounts.expire(entries))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In an empty context: a task made here would otherwise inherit the first caller's request id, and Ray would
        # cancel everybody's batches with that one request.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _by_adapter(entries: Iterable[Waiting]) -> dict[str | None, list[Waiting]]:
    groups: dict[str | None, list[Waiting]] = defaultdict(list)
    for entry in entries:
        groups[entry.digest].append(entry)
    return groups


async def _sleep(wake: asyncio.Event, seconds: float | None) -> None:
    """Until something happens, at most ``seconds``; None: until then."""
    try:
        async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may swallow a cancellation
            await wake.wait()
    except TimeoutError:
        return
