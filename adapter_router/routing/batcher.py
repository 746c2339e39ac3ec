"""Which rows make a batch, and when it may leave. Work-conserving: rows gather while replicas are busy.

No timer holds a full batch, and none holds a row for long. No state but the configuration, no clock.
"""

from __future__ import annotations

from contextlib import closing

from adapter_router.config import RoutingConfig
from adapter_router.routing.fair_queue import FairQueue
from adapter_router.routing.waiting import Waiting

_FREE_PADDING = 1 / 64  # of max_batch_tokens


class Batcher:
    """Rows leave in the queue's order, those of like length together."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config

    def closes_in(self, queue: FairQueue, now: float) -> float | None:
        """Seconds until a batch may leave for a free replica: 0 when it is full or its oldest row has waited enough.

        None when no row waits.
        """
        oldest = queue.oldest
        if oldest is None:
            return None
        if len(queue) >= self._config.max_batch_rows or queue.tokens >= self._config.max_batch_tokens:
            return 0.0
        return max(0.0, oldest.arrived + self._config.batch_wait_s - now)

    def take(self, queue: FairQueue, now: float) -> list[Waiting]:
        """The rows of a batch, taken out and charged; rows nobody waits for any more are dropped.

        The row whose turn it is always goes, however large. Others join while the batch, padded, stays within
        ``max_batch_tokens`` and its padding within ``max_padding`` of it. A batch that is not full then takes what adds
        up to padding of a 64th of ``max_batch_tokens``: that costs less than another forward for the row left behind.
        Rows that do not fit keep their places; ``max_batch_rows`` tenants that have none which fits are asked.
        """
        batch = _Batch(self._config)
        for free_padding in (0.0, _FREE_PADDING * self._config.max_batch_tokens):
            batch.free_padding = free_padding
            if not batch.full:
                self._fill(batch, queue, now)
        return batch.rows

    def _fill(self, batch: _Batch, queue: FairQueue, now: float) -> None:
        with closing(queue.pops(now, batch.fits, self._config.max_batch_rows)) as turns:
            for entry in turns:
                if not entry.answer.done():
                    queue.charge(entry)
                    batch.add(entry)
                    if batch.full:
                        return


class _Batch:
    """Tokens are estimates, as in ``Waiting``."""

    def __init__(self, config: RoutingConfig) -> None:
        self.rows: list[Waiting] = []
        self.free_padding = 0.0
        self._config = config
        self._tokens = 0
        self._longest = 0

    @property
    def full(self) -> bool:
        """Whether no row would fit, of whatever length."""
        rows = len(self.rows)
        return rows >= self._config.max_batch_rows or (rows + 1) * self._longest > self._config.max_batch_tokens

    def fits(self, entry: Waiting) -> bool:
        """Whether it may join; nobody waits for what is done, it fits anywhere."""
        longest, tokens = max(self._longest, entry.tokens), self._tokens + entry.tokens
        padded, limit = (len(self.rows) + 1) * longest, self._config.max_batch_tokens
        few = padded - tokens <= max(self._config.max_padding * padded, self.free_padding)
        return not self.rows or (padded <= limit and few) or entry.answer.done()

    def add(self, entry: Waiting) -> None:
        self.rows.append(entry)
        self._longest, self._tokens = max(self._longest, entry.tokens), self._tokens + entry.tokens
