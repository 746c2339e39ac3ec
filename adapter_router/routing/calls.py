"""Calls of replicas that are under way: each row is answered by the first that answers it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InternalError, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.pace import Pace
from adapter_router.routing.replica_state import ReplicaState
from adapter_router.routing.retry_budget import RetryBudget
from adapter_router.routing.tasks import Tasks
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult, ShardReply

logger = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
_RESERVE = 256.0  # rows that may be sent again before any were sent first: what a replica may hold when it dies
_POLL_S = 0.05
_TRUST_S = 30.0


Send = Callable[[str, Sequence[Row], Sequence[AdapterVersion | None], int], Awaitable[ShardReply]]
"""One call of one replica, whose residency is known up to a revision. Raises ReplicaLost when it is gone."""


@dataclass(eq=False)
class Call:
    """Rows for one replica; ``cold`` is the adapter they wait for there, if any: none waits for another's load."""

    state: ReplicaState
    cold: str | None
    rows: Sequence[Waiting]
    task: asyncio.Task[None] = field(init=False, repr=False)
    lost: ReplicaLost | None = None

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(entry.tokens for entry in self.rows)

    @property
    def open(self) -> list[Waiting]:
        """Rows that still wait for an answer."""
        return [entry for entry in self.rows if not entry.answer.done()]

    @property
    def unanswered_here(self) -> list[Waiting]:
        """Of those the ones that have not been sent elsewhere since."""
        return [entry for entry in self.open if entry.sent_to == self.state.replica and entry.lane is None]


class Owner(Protocol):
    """Whoever has rows called for: is told what becomes of them."""

    def finish(self, rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> None:
        """Answers; of rows that have one already they are ignored."""

    def again(self, rows: Sequence[Waiting], avoid: str) -> None:
        """Rows shall go to another replica than ``avoid``."""

    def suspected(self, state: ReplicaState) -> None:
        """A replica does not answer in time, or is gone: what waits for it shall go elsewhere."""

    def returned(self, call: Call) -> None:
        """A call is over, whatever became of it."""


class Calls:
    """Sends, answers, and sends again what a replica loses or keeps for too long, within a budget."""

    def __init__(
        self,
        send: Send,
        fleet: Fleet,
        owner: Owner,
        config: RoutingConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._send = send
        self._fleet = fleet
        self._owner = owner
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._budget = RetryBudget(config.retry_budget, _RESERVE)
        self._calls: defaultdict[str, set[Call]] = defaultdict(set)
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)
        self._answered: dict[str, float] = {}  # by replica, when its last warm call was
        self._suspected: dict[str, float] = {}  # replicas, and since when
        self._lost: set[str] = set()
        self._tasks = Tasks()

    async def close(self) -> None:
        """Abandon what is under way."""
        await self._tasks.close()

    def start(self, call: Call) -> None:
        """Send a call's rows, which have been taken from their lane."""
        first = sum(entry.attempts == 0 for entry in call.rows)
        self._budget.earn(first)
        for entry in call.rows:
            entry.lane, entry.sent_to = None, call.state.replica
            entry.attempts += 1
        self._fleet.sent(call.state, len(call.rows), call.cold)
        self._calls[call.state.replica].add(call)
        call.task = self._tasks.spawn(self._run(call))
        call.task.add_done_callback(lambda _: self._over(call))

    def forsaken(self, entry: Waiting) -> None:
        """Nobody waits for a row any more: the call that it is in is taken back if nobody waits for the others."""
        for call in self._calls.get(entry.sent_to or "", ()):
            if call.task is not asyncio.current_task() and entry in call.rows and not call.open:
                call.task.cancel()

    @property
    def warm_tokens(self) -> int:
        """Of calls under way that wait for no load."""
        return sum(call.tokens for calls in self._calls.values() for call in calls if call.cold is None)

    @property
    def tokens_s(self) -> float | None:
        """What all replicas together serve a second; None while nothing is known."""
        choosable = [state for state in self._fleet.states() if state.choosable]
        known = [pace.token_s for s in choosable if (pace := self._paces.get(s.replica)) and pace.token_s]
        return sum(1 / token_s for token_s in known) * len(choosable) / len(known) if known else None

    def has_lost(self, state: ReplicaState) -> bool:
        """Whether a call of this replica has been lost, so that it will hardly live any more."""
        return state.replica in self._lost

    def trust_again(self) -> None:
        """Replicas that have been suspected for long, and still live, shall prove themselves."""
        since = self._clock() - _TRUST_S
        for state in self._fleet.states():
            if state.suspect and not self._calls.get(state.replica) and self._suspected[state.replica] < since:
                self._clear(state)
        living = {state.replica for state in self._fleet.states()}
        self._lost &= living
        by_replica: tuple[dict[str, Any], ...] = (self._suspected, self._paces, self._answered)
        for known in by_replica:
            for gone in known.keys() - living:
                del known[gone]

    async def _run(self, call: Call) -> None:
        try:
            await self._answer(call)
        except ReplicaLost as error:
            call.lost = error
        except AdapterRouterError as error:
            self._owner.finish(call.rows, [error] * len(call.rows))
        except Exception as error:
            logger.exception("replica %s failed on %d rows", call.state.replica, len(call.rows))
            failed = InternalError(f"the replica failed: {type(error).__name__}")
            self._owner.finish(call.rows, [failed] * len(call.rows))

    def _over(self, call: Call) -> None:
        """Whatever happened to the call, and if it was taken back before it began: its rows are not left alone."""
        self._calls[call.state.replica].discard(call)
        if not self._calls[call.state.replica]:
            del self._calls[call.state.replica]
        self._fleet.returned(call.state, len(call.rows), call.cold)
        if call.lost is not None:
            self._lost.add(call.state.replica)
            self._tasks.spawn(self._replace(call, call.lost))
        else:  # nothing is left to do here unless the call was taken back
            self._owner.finish(call.rows, [InternalError("the call was cancelled")] * len(call.rows))
        self._owner.returned(call)

    async def _replace(self, call: Call, lost: ReplicaLost) -> None:
        """As ``_over``: whatever goes wrong on the way, nobody is left waiting."""
        try:
            self._suspect(call.state)
            await self._send_again(call, lost)
        except Exception:
            logger.exception("%d rows of lost replica %s cannot be sent again", len(call.rows), call.state.replica)
            self._owner.finish(call.rows, [lost] * len(call.rows))

    async def _answer(self, call: Call) -> None:
        rows, state, start = call.rows, call.state, self._clock()
        sending = asyncio.ensure_future(
            self._send(state.replica, [_remaining(e, start) for e in rows], [e.version for e in rows], state.revision)
        )
        try:
            if call.cold is None:
                tokens = sum(other.tokens for other in self._calls[state.replica] if other.cold is None)
                expected = (self._paces[state.replica].token_s or 0.0) * tokens
                patience = max(self._config.min_patience_s, self._config.patience * expected)
                await asyncio.wait({sending}, timeout=patience)
                if not sending.done():
                    self._suspect(state)
            reply = await sending
        finally:
            sending.cancel()
        if len(reply.outcomes) != len(rows):
            raise InternalError(f"the replica answered {len(reply.outcomes)} of {len(rows)} rows")
        self._fleet.observe(reply, self._row_s(call, start) if call.cold is None else None)
        self._clear(state)
        self._owner.finish(rows, [_signed(outcome, reply.replica) for outcome in reply.outcomes])

    def _row_s(self, call: Call, start: float) -> float:
        """Seconds that the replica took for each row: since the call before was answered, if it came meanwhile."""
        replica, now = call.state.replica, self._clock()
        seconds = now - max(start, self._answered.get(replica, start))
        self._answered[replica] = now
        self._paces[replica].add(call.tokens, seconds)
        return seconds / len(call.rows)

    def _suspect(self, state: ReplicaState) -> None:
        """The replica may be stuck: until it answers nothing more goes there, and what it holds goes elsewhere, too."""
        if state.suspect:
            return
        logger.warning("replica %s does not answer", state.replica)
        self._metrics.suspicions.inc()
        self._suspected[state.replica] = self._clock()
        self._fleet.set_suspect(state, True)
        self._owner.suspected(state)
        for call in list(self._calls.get(state.replica, ())):
            self._tasks.spawn(self._send_again(call, None))

    def _clear(self, state: ReplicaState) -> None:
        self._lost.discard(state.replica)
        if state.suspect:
            self._fleet.set_suspect(state, False)

    async def _send_again(self, call: Call, lost: ReplicaLost | None) -> None:
        """Rows without an answer go elsewhere; inference has no side effects. Those of a lost call wait until they may.

        Rows of a call that is only late stay in it: whichever answers first does.
        """
        if lost is not None:
            spent = [entry for entry in call.unanswered_here if entry.attempts >= _MOST_ATTEMPTS]
            self._owner.finish(spent, [lost] * len(spent))
        while rows := [entry for entry in call.unanswered_here if entry.attempts < _MOST_ATTEMPTS]:
            if self._budget.take(len(rows), self._clock()):
                self._metrics.retried.inc(len(rows))
                self._owner.again(rows, avoid=call.state.replica)
                return
            if lost is None and call not in self._calls.get(call.state.replica, ()):
                return  # the call is over: it has answered them, or they are sent again as lost ones
            await asyncio.sleep(_POLL_S)


def _remaining(entry: Waiting, now: float) -> Row:
    """The row with the time it has left: the replica's clock is another."""
    return replace(entry.row, timeout_s=max(0.0, entry.deadline - now))


def _signed(outcome: RowOutcome, replica: str) -> RowOutcome:
    return replace(outcome, replica=replica) if isinstance(outcome, RowResult) else outcome
