"""One row in the router, from its arrival to its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from adapter_router.types import AdapterVersion, Row, RowOutcome


@dataclass(eq=False)
class Waiting:
    """``answer`` is done early when its caller has gone. ``tokens``: an estimate, nobody tokenises in the router.

    ``arrived`` and ``deadline`` in seconds of the dispatcher's clock. Of one tenant and adapter rows of a higher
    ``priority`` go first.
    """

    row: Row
    version: AdapterVersion | None
    arrived: float
    answer: asyncio.Future[RowOutcome] = field(repr=False)
    tenant: str = ""
    tokens: int = 1
    priority: int = 0
    deadline: float | None = None

    @property
    def digest(self) -> str | None:
        """Of its adapter's content; None is the bare base."""
        return self.version.digest if self.version else None
