"""What the router knows of each replica: what it holds, how busy it is, how fast. Fed by every reply."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from adapter_router.types import ResidencyChange

_MAX_COLD_CALLS = 64
_MAX_CALLS_FOR_ONE = 2  # of those, for an adapter that is not there yet: a load that hangs shall not take them all
_SMOOTHING = 0.2  # weight of the newest observation in the running means


@dataclass
class ReplicaState:
    """``warm_calls`` counts batches of resident adapters in flight; ``rows`` all rows in flight, cold ones too.

    ``resident`` is what the replica held at ``revision``, as it counts its own changes. ``loading`` counts, by adapter,
    the calls in flight that wait for it there.
    """

    replica: str
    resident: set[str] = field(default_factory=set)
    revision: int = 0
    warm_calls: int = 0
    rows: int = 0
    loading: Counter[str] = field(default_factory=Counter)
    row_s: float = 0.005
    load_s: float = 0.05
    _cold_calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_COLD_CALLS), repr=False)
    _calls_for: dict[str, asyncio.Semaphore] = field(default_factory=dict, repr=False)

    def holds(self, digest: str | None) -> bool:
        """Whether rows of that adapter run at once; the bare base (None) always does."""
        return digest is None or digest in self.resident

    def sent(self, rows: int, cold: str | None) -> None:
        """A call of ``rows`` rows left for this replica; ``cold`` is the adapter it waits for there, if any."""
        self.rows += rows
        if cold is None:
            self.warm_calls += 1
        else:
            self.loading[cold] += 1

    def returned(self, rows: int, cold: str | None) -> None:
        """The call came back, or was lost."""
        self.rows -= rows
        if cold is None:
            self.warm_calls -= 1
        else:
            self.loading[cold] -= 1
            if not self.loading[cold]:
                del self.loading[cold]
                self._calls_for.pop(cold, None)

    @asynccontextmanager
    async def turn(self, cold: str) -> AsyncIterator[None]:
        """Wait until one more call for a cold adapter may go: they are bounded, so that warm ones find a thread.

        Few go while it is loading; once it is known to be there, all the others may.
        """
        calls = self._calls_for.setdefault(cold, asyncio.Semaphore(_MAX_CALLS_FOR_ONE))
        async with calls, self._cold_calls:
            yield

    def learn(self, change: ResidencyChange) -> None:
        """Bring ``resident`` up to date; news older than what is known is no news."""
        if change.revision < self.revision:
            return
        self.revision = change.revision
        if change.complete:
            self.resident = set(change.added)
        else:
            self.resident -= change.removed
            self.resident |= change.added
        for arrived in self._calls_for.keys() & change.added:
            for _ in range(_MAX_COLD_CALLS):
                self._calls_for[arrived].release()

    @property
    def backlog_s(self) -> float:
        """Estimated time until the rows in flight are answered."""
        return self.rows * self.row_s


class Fleet:
    """The replicas of one base model. Used from one event loop only."""

    def __init__(self) -> None:
        self._states: dict[str, ReplicaState] = {}

    def sync(self, replicas: Iterable[str]) -> None:
        """Make ``replicas`` the living ones; what is known of those that stay is kept."""
        self._states = {replica: self._states.get(replica) or ReplicaState(replica) for replica in replicas}

    def states(self) -> list[ReplicaState]:
        """The living replicas."""
        return list(self._states.values())

    def free(self, calls_per_replica: int) -> list[ReplicaState]:
        """Replicas that can take another warm batch now."""
        return [state for state in self._states.values() if state.warm_calls < calls_per_replica]

    def observe(self, replica: str, residency: ResidencyChange, row_s: float | None, load_s: float) -> None:
        """A reply's news; ``row_s`` None where it says nothing of a row's time."""
        if (state := self._states.get(replica)) is not None:
            state.learn(residency)
            state.load_s = load_s
            if row_s is not None:
                state.row_s += _SMOOTHING * (row_s - state.row_s)

    def loaded(self, replica: str, digest: str) -> None:
        """``replica`` has loaded ``digest`` just now."""
        if (state := self._states.get(replica)) is not None:
            state.resident.add(digest)
