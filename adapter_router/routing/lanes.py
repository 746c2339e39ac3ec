"""What waits for one replica, and which of it leaves next: a batch that can run at once, or a load."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from adapter_router.config import RoutingConfig
from adapter_router.routing.batcher import Batcher
from adapter_router.routing.calls import Call
from adapter_router.routing.fair_queue import FairQueue
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import ReplicaState
from adapter_router.routing.waiting import Waiting


class Lane:
    """Rows assigned to a replica. Warm ones gather while it is busy; a cold adapter's first call begins its load.

    The other rows of an adapter that is on its way wait here, not in the replica: there each call takes a thread; here
    they can still be taken back, and go elsewhere when the load fails.
    """

    def __init__(self, state: ReplicaState, fleet: Fleet, config: RoutingConfig) -> None:
        """``fleet`` is told what waits for ``state``."""
        self.state = state
        self._fleet = fleet
        self.wake = asyncio.Event()  # something has changed here
        self._config = config
        self._batcher = Batcher(config)
        self._warm = FairQueue(config.max_wait_s, self._weight)
        self._cold = FairQueue(config.max_wait_s, self._weight)  # one row for each adapter whose load has not begun
        self._behind: dict[str, list[Waiting]] = {}  # the others, and those of adapters that are being loaded
        self._cold_calls = 0

    def __len__(self) -> int:
        """Rows that wait here."""
        return len(self._warm) + len(self._cold) + sum(map(len, self._behind.values()))

    @property
    def num_blocked(self) -> int:
        """Rows that could run at once, if only the replica were free."""
        return 0 if self._is_free else len(self._warm)

    @property
    def waiting_tokens(self) -> int:
        """Of rows that could run at once; 0 where all of them may leave now."""
        calls = self._config.calls_per_replica - self.state.warm_calls
        return self._warm.tokens if len(self._warm) > max(0, calls) * self._config.max_batch_rows else 0

    @property
    def oldest(self) -> float | None:
        """When the first of the rows here arrived."""
        arrivals = [entry.arrived for entry in (self._warm.oldest, self._cold.oldest) if entry is not None]
        arrivals += [entries[0].arrived for entries in self._behind.values() if entries]
        return min(arrivals, default=None)

    def put(self, entries: Iterable[Waiting]) -> None:
        """Rows that wait here from now on."""
        for entry in entries:
            entry.lane = self.state.replica
            digest = entry.digest
            if digest is None or self.state.holds(digest):
                self._warm.put(entry)
            elif digest in self._behind:
                self._behind[digest].append(entry)
            else:
                self._behind[digest] = []
                self._cold.put(entry)
                self._fleet.expect(self.state, digest)
        self._count()

    def remove(self, entry: Waiting) -> bool:
        """Take a row out; whether it was here."""
        waiting = len(self._warm), len(self._cold)
        self._warm.remove(entry)
        self._cold.remove(entry)
        if len(self._cold) < waiting[1]:
            self._fleet.expect_no_more(self.state, entry.digest or "")
            self.put(self._behind.pop(entry.digest or ""))  # the next of them stands for all
        elif len(self._warm) == waiting[0]:
            behind = self._behind.get(entry.digest or "", [])
            if entry not in behind:
                return False
            behind.remove(entry)
        self._count()
        return True

    def closes_in(self, now: float) -> float | None:
        """Seconds until a batch may leave although nothing else happens; None: not before something does."""
        return self._batcher.closes_in(self._warm, now) if self._is_free else None

    def leave(self, now: float) -> Call | None:
        """The next call of those that may leave now; its rows count as queued until it is sent."""
        call = self._load(now) or self._batch(now)
        if call is None:
            self._count()  # some may have gone without leaving
        return call

    def returned(self, call: Call) -> Sequence[Waiting]:
        """A call of this lane is over; rows that waited for its adapter, to be put where they belong now."""
        if call.cold is None:
            return ()
        self._cold_calls -= 1
        waiting = self._behind.pop(call.cold, ())
        self._count()
        return waiting

    def some(self, count: int, now: float) -> list[Waiting]:
        """Take out at most ``count`` rows that could run at once, in the order in which they would leave."""
        taken: list[Waiting] = []
        while len(taken) < count and (entry := self._warm.pop(now)) is not None:
            taken.append(entry)
        self._count()
        return taken

    def drain(self) -> list[Waiting]:
        """Take out everything."""
        entries = [entry for behind in self._behind.values() for entry in behind]
        self._behind.clear()
        while (entry := self._warm.pop(0.0)) is not None:
            entries.append(entry)
        while (entry := self._cold.pop(0.0)) is not None:
            self._fleet.expect_no_more(self.state, entry.digest or "")
            entries.append(entry)
        self._count()
        return entries

    @property
    def _is_free(self) -> bool:
        return self.state.warm_calls < self._config.calls_per_replica

    def _count(self) -> None:
        self._fleet.assigned(self.state, len(self) - self.state.queued)

    def _weight(self, tenant: str) -> float:
        return self._config.tenant_weights.get(tenant, 1.0)

    def _batch(self, now: float) -> Call | None:
        while self._is_free and self._batcher.closes_in(self._warm, now) == 0.0:
            rows = self._batcher.take(self._warm, now)
            self.put(entry for entry in rows if not self.state.holds(entry.digest))  # evicted while they waited
            if rows := [entry for entry in rows if self.state.holds(entry.digest)]:
                return Call(self.state, None, rows)
        return None

    def _load(self, now: float) -> Call | None:
        while self._cold and self._cold_calls < self._config.cold_calls_per_replica:
            first = self._cold.pop(now)
            assert first is not None and first.digest is not None
            digest = first.digest
            self._fleet.expect_no_more(self.state, digest)  # the call will say so
            if self.state.holds(digest):  # another call brought it
                self.put([first, *self._behind.pop(digest)])
                continue
            behind = [entry for entry in (first, *self._behind.pop(digest)) if not entry.answer.done()]
            if not behind:
                continue
            rows, self._behind[digest] = behind[: self._config.max_batch_rows], behind[self._config.max_batch_rows :]
            for entry in rows:
                self._cold.charge(entry)
            self._cold_calls += 1
            return Call(self.state, digest, rows)
        return None
