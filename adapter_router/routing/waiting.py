"""One row in the router, from its arrival to its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from adapter_router.types import AdapterVersion, Row, RowOutcome


@dataclass(eq=False)
class Waiting:
    """``answer`` is done early when its caller has gone or its time is over.

    ``tokens``: an estimate, nobody tokenises in the router. ``arrived`` and ``deadline`` in seconds of the dispatcher's
    clock. ``lane``: the replica in whose lane it waits, if any. ``sent_to``: where it went last, of ``attempts`` times.
    """

    row: Row
    version: AdapterVersion | None
    arrived: float
    answer: asyncio.Future[RowOutcome] = field(repr=False)
    tokens: int = 1
    deadline: float = float("inf")
    lane: str | None = None
    sent_to: str | None = None
    attempts: int = 0

    @property
    def digest(self) -> str | None:
        """Of its adapter's content; None is the bare base."""
        return self.version.digest if self.version else None

    @property
    def tenant(self) -> str:
        """Whose share it is served from."""
        return self.row.tenant
