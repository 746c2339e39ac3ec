"""One replica, as the router knows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from adapter_router.types import ResidencyChange


@dataclass(frozen=True)
class Member:
    """A living replica, as the deployment sees it.

    ``replica`` is unique to this incarnation. ``home`` stays across restarts: rendezvous hashing goes by it.
    ``weight``: its memory for adapters, relative to the others'; it may carry as much more of the rows.
    """

    replica: str
    home: str
    weight: float = 1.0


@dataclass(eq=False)
class ReplicaState:
    """What is known of one replica. Read by anybody; rows, calls and adapters are changed by its ``Fleet`` alone.

    ``resident`` is what it held at ``revision``, as it counts its own changes. ``loading`` counts, by adapter, what
    waits there for it to come: calls in flight, and rows whose call has not left; ``warm_calls`` are those that wait
    for nothing. ``queued``: rows of this router that are meant for it and have not left; ``in_flight``: sent and not
    answered; ``others``: of other routers, as its last reply told. ``choosable``: it may get rows just now. ``place``:
    in the fleet's arrays, -1 once it has gone.
    """

    replica: str
    home: str = ""
    weight: float = 1.0
    resident: set[str] = field(default_factory=set)
    revision: int = 0
    warm_calls: int = 0
    queued: int = 0
    in_flight: int = 0
    others: int = 0
    loading: Counter[str] = field(default_factory=Counter)
    row_s: float = 0.005
    load_s: float = 0.05
    suspect: bool = False
    admitted: bool = False
    choosable: bool = False
    place: int = -1

    @property
    def rows(self) -> int:
        """All rows that it has to answer, as far as is known here."""
        return self.queued + self.in_flight + self.others

    @property
    def backlog_s(self) -> float:
        """Estimated seconds until they are answered."""
        return self.rows * self.row_s

    def holds(self, digest: str | None) -> bool:
        """Whether rows of that adapter run at once; the bare base (None) always does."""
        return digest is None or digest in self.resident

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
