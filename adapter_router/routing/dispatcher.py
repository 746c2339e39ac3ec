"""Rows in, outcomes out: lets rows in, has them placed, and sees to it that none waits longer than it may."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from adapter_router.config import RoutingConfig
from adapter_router.errors import InternalError
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.accounts import Accounts
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.placement import POLL_S, Placement, Replicas
from adapter_router.routing.pressure import Pressure, RouterLoad
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row, RowOutcome

logger = logging.getLogger(__name__)


class Dispatcher:
    """The door of one base: routes rows to its replicas. Lives on one event loop; ``clock`` gives seconds."""

    def __init__(
        self,
        replicas: Replicas,
        config: RoutingConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int | None = None,
    ) -> None:
        """``max_tokens``: of one row, where the base has a limit."""
        self._clock = clock
        self._pressure = Pressure()
        self._accounts = Accounts(config, metrics, self._pressure, clock, max_tokens)
        self._placement = Placement(replicas, self._accounts, self._pressure, config, metrics, clock)

    def __len__(self) -> int:
        """Rows that wait to be sent."""
        return len(self._placement)

    @property
    def fleet(self) -> Fleet:
        """What is known of the replicas."""
        return self._placement.fleet

    async def close(self) -> None:
        """Stop dispatching; rows in flight are abandoned."""
        await self._placement.close()

    async def submit(
        self, rows: Sequence[tuple[Row, AdapterVersion | None]], together: bool = False
    ) -> list[RowOutcome]:
        """Outcomes in the order of ``rows``; ``together``: from one replica where one has all their adapters.

        Cancelling the call takes back those of its rows that do not run yet.
        """
        entries = self._accounts.enter(rows, self._placement.backlog())
        accepted = [entry for entry in entries if not entry.answer.done()]
        self._put(accepted, together)
        timers = self._timers(accepted)
        try:
            return await asyncio.gather(*(entry.answer for entry in entries))
        finally:
            for timer in timers:
                timer.cancel()
            gone = [entry for entry in accepted if entry.answer.cancelled()]
            self._accounts.cancelled(gone)
            self._placement.take_back(gone)

    async def home(self, digest: str) -> str:
        """The replica that should load an adapter nobody holds yet; waits for one to live."""
        while (state := self._placement.home(digest)) is None:
            self._pressure.came(0, self._clock())  # a base without a replica is woken for who waits here, too
            await asyncio.sleep(POLL_S)
        return state.replica

    def load(self) -> RouterLoad:
        """What the rows of just now ask of the replicas."""
        now, oldest = self._clock(), self._placement.oldest
        return self._pressure.load(len(self), self._accounts.tokens, 0.0 if oldest is None else now - oldest, now)

    def _put(self, entries: Sequence[Waiting], together: bool) -> None:
        """A fault of ours costs the rows of one call, never those that wait already."""
        try:
            self._placement.put(entries, together)
        except Exception:
            logger.exception("%d rows cannot be dispatched", len(entries))
            self._placement.finish(entries, [InternalError("the row cannot be dispatched")] * len(entries))

    def _timers(self, entries: Sequence[Waiting]) -> list[asyncio.TimerHandle]:
        now, loop = self._clock(), asyncio.get_running_loop()
        groups: dict[float, list[Waiting]] = defaultdict(list)
        for entry in entries:
            groups[entry.deadline].append(entry)
        return [loop.call_later(max(0.0, at - now), self._expire, group) for at, group in groups.items()]

    def _expire(self, entries: Sequence[Waiting]) -> None:
        self._placement.take_back(self._accounts.expire(entries))
