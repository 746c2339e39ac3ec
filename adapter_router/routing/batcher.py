"""Rows that wait for a batch. Work-conserving: rows gather while replicas are busy, never because a timer says so."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from adapter_router.types import AdapterVersion, Row, RowOutcome


@dataclass
class Waiting:
    """One row in the router; ``answer`` is done early when its caller has gone."""

    row: Row
    version: AdapterVersion | None
    arrived: float
    answer: asyncio.Future[RowOutcome] = field(repr=False)

    @property
    def digest(self) -> str | None:
        return self.version.digest if self.version else None


class Batcher:
    """First in, first out. No clock of its own."""

    def __init__(self, max_batch_rows: int, batch_wait_s: float) -> None:
        self._max_batch_rows = max_batch_rows
        self._batch_wait_s = batch_wait_s
        self._queue: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, waiting: Waiting) -> None:
        """Add a row at the end."""
        self._queue.append(waiting)

    def closes_in(self, now: float) -> float | None:
        """Seconds until a batch may leave for a free replica: 0 when it is full or its oldest row has waited enough.

        None when no row waits.
        """
        if not self._queue:
            return None
        if len(self._queue) >= self._max_batch_rows:
            return 0.0
        return max(0.0, self._queue[0].arrived + self._batch_wait_s - now)

    def take(self, num_replicas: int) -> list[Waiting]:
        """The oldest rows, a full batch for each of ``num_replicas``; rows nobody waits for any more are dropped."""
        batch: list[Waiting] = []
        while self._queue and len(batch) < self._max_batch_rows * num_replicas:
            waiting = self._queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch
