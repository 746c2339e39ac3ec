"""Which replica each row waits for, and when rows leave: lanes, kept in step with the replicas that live."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from adapter_router.config import RoutingConfig
from adapter_router.errors import InternalError
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.accounts import Accounts
from adapter_router.routing.admission import Backlog
from adapter_router.routing.affinity import Wanted, choose
from adapter_router.routing.calls import Call, Calls
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.joining import Joining
from adapter_router.routing.lanes import Lane
from adapter_router.routing.pressure import Pressure
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.routing.tasks import Tasks
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row, RowOutcome, ShardReply

logger = logging.getLogger(__name__)

POLL_S = 0.05  # how soon a change of the replica set is noticed
_MEASURE_S = 0.01
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


class Placement:
    """Rows of one base between their arrival and their answer. ``clock`` gives seconds."""

    def __init__(
        self,
        replicas: Replicas,
        accounts: Accounts,
        pressure: Pressure,
        config: RoutingConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.fleet = Fleet()
        self._replicas = replicas
        self._accounts = accounts
        self._pressure = pressure
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._tasks = Tasks()
        self._calls = Calls(replicas.send, self.fleet, self, config, metrics, clock)
        self._joining = Joining(self.fleet, pressure.demand, replicas.warm, metrics)
        self._lanes: dict[str, Lane] = {}
        self._homeless: list[Waiting] = []  # rows that no replica lives for
        self._backlog = Backlog()
        self._measured = 0.0
        self._tasks.spawn(self._follow())

    def __len__(self) -> int:
        """Rows that wait to be sent."""
        return len(self._homeless) + sum(map(len, self._lanes.values()))

    @property
    def oldest(self) -> float | None:
        """When the first of them arrived."""
        arrivals = [lane.oldest for lane in self._lanes.values()] + [entry.arrived for entry in self._homeless]
        return min((arrived for arrived in arrivals if arrived is not None), default=None)

    def backlog(self) -> Backlog:
        """What a row that comes now finds; a hundredth of a second old at most."""
        now = self._clock()
        if now - self._measured > _MEASURE_S:
            self._measured = now
            waiting = sum(lane.waiting_tokens for lane in self._lanes.values())
            # Until a row is answered: what waits, what is under way, and on each replica the batch that it will be in.
            under_way = self._calls.warm_tokens * (1 + 1 / self._config.calls_per_replica)
            tokens = waiting + round(under_way) if waiting else 0
            self._backlog = Backlog(tokens, self._calls.tokens_s)
        return self._backlog

    async def close(self) -> None:
        """Send nothing more; rows in flight are abandoned."""
        await self._tasks.close()
        await self._calls.close()

    def put(self, entries: Sequence[Waiting], together: bool) -> None:
        """Rows that have arrived. ``together``: to one replica where one holds all their adapters."""
        self._sync()
        now = self._clock()
        for members in _by_adapter(entries).values():
            if (version := members[0].version) is not None:
                self._pressure.asked(version, len(members), now)
                self._joining.note(version)
        self._assign(entries, together=together)

    def take_back(self, entries: Iterable[Waiting]) -> None:
        """Nobody waits for these rows any more."""
        for entry in entries:
            lane = self._lanes.get(entry.lane or "")
            if not (lane is not None and lane.remove(entry)) and entry in self._homeless:
                self._homeless.remove(entry)
            self._calls.forsaken(entry)

    def home(self, digest: str) -> ReplicaState | None:
        """The replica that should load an adapter nobody holds yet, if any lives."""
        self._sync()
        return self._choice(digest, 1)

    # -- what becomes of calls: see ``calls.Owner`` --------------------------------------------------------------

    def finish(self, rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> None:
        """Answers; a row that was sent elsewhere as well is taken back there."""
        self.take_back(entry for entry in self._accounts.finish(rows, outcomes) if entry.lane or entry.attempts > 1)

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
            await asyncio.sleep(POLL_S)

    def _sync(self) -> None:
        came, gone = self.fleet.sync(self._replicas.members())
        for state in came:
            lane = self._lanes[state.replica] = Lane(state, self.fleet, self._config)
            self._tasks.spawn(self._serve(lane))
            self._tasks.spawn(self._admit(lane))
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
