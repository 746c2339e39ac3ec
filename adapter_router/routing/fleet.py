"""What the router knows of each replica: what it holds, how busy it is, how fast. Fed by every reply."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

_MAX_COLD_CALLS = 64
_SMOOTHING = 0.2  # weight of the newest observation in the running means


@dataclass
class ReplicaState:
    """``warm_calls`` counts batches of resident adapters in flight; ``rows`` all rows in flight, cold ones too.

    ``cold_calls`` bounds the calls that wait for an adapter, so that warm ones always find a thread.
    """

    replica: str
    resident: frozenset[str] = frozenset()
    warm_calls: int = 0
    rows: int = 0
    row_s: float = 0.005
    load_s: float = 0.05
    cold_calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_COLD_CALLS))

    def holds(self, digest: str | None) -> bool:
        """Whether rows of that adapter run at once; the bare base (None) always does."""
        return digest is None or digest in self.resident

    def sent(self, rows: int, *, cold: bool) -> None:
        """A shard of ``rows`` rows left for this replica."""
        self.rows += rows
        self.warm_calls += not cold

    def returned(self, rows: int, *, cold: bool) -> None:
        """The shard came back, or was lost."""
        self.rows -= rows
        self.warm_calls -= not cold

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

    def observe(self, replica: str, resident: frozenset[str], row_s: float | None, load_s: float) -> None:
        """A reply's news; ``row_s`` None where it says nothing of a row's time."""
        if (state := self._states.get(replica)) is not None:
            state.resident = resident
            state.load_s = load_s
            if row_s is not None:
                state.row_s += _SMOOTHING * (row_s - state.row_s)

    def loaded(self, replica: str, digest: str) -> None:
        """``replica`` has loaded ``digest`` just now."""
        if (state := self._states.get(replica)) is not None:
            state.resident |= {digest}
