"""Who may come in, and what is known of a row when it goes: every row enters once and is finished once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, DeadlineExceeded
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.admission import Admission, Backlog
from adapter_router.routing.pressure import Pressure
from adapter_router.routing.tokens import TokenEstimate
from adapter_router.routing.waiting import Waiting
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult

BASE_SERIES = "__base__"


class Accounts:
    """Rows between their arrival and their answer."""

    def __init__(
        self,
        config: RoutingConfig,
        metrics: RouterMetrics,
        pressure: Pressure,
        clock: Callable[[], float],
        max_tokens: int | None,
    ) -> None:
        self.tokens = 0  # of rows without an answer
        self._config = config
        self._metrics = metrics
        self._pressure = pressure
        self._clock = clock
        self._admission = Admission(config)
        self._estimate = TokenEstimate(max_tokens)

    def enter(self, rows: Sequence[tuple[Row, AdapterVersion | None]], backlog: Backlog) -> list[Waiting]:
        """One entry a row; those that are not let in, with that much ahead of them, have their answer already."""
        now, loop = self._clock(), asyncio.get_running_loop()
        entries = []
        by_tenant: dict[str, list[Waiting]] = defaultdict(list)
        for row, version in rows:
            timeout_s = self._config.timeout_s if row.timeout_s is None else row.timeout_s
            tokens = self._estimate.of(row.inputs)
            entry = Waiting(row, version, now, loop.create_future(), tokens, now + timeout_s)
            entries.append(entry)
            by_tenant[row.tenant].append(entry)
        for tenant, group in by_tenant.items():
            self._let_in(tenant, group, backlog, now)
        return entries

    def finish(self, rows: Sequence[Waiting], outcomes: Sequence[RowOutcome]) -> list[Waiting]:
        """Answer rows; which of them had no answer yet."""
        now = self._clock()
        finished = []
        for entry, outcome in zip(rows, outcomes, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(outcome)
                self._leave(entry, outcome, now)
                finished.append(entry)
        if rows and isinstance(outcomes[0], RowResult):
            self._estimate.learn(rows[0].row.inputs, outcomes[0].num_tokens)
        return finished

    def expire(self, rows: Sequence[Waiting]) -> list[Waiting]:
        """The time of these rows is over; which of them had no answer yet."""
        late = [entry for entry in rows if not entry.answer.done()]
        self._pressure.missed(len(late), self._clock())
        given = [entry.deadline - entry.arrived for entry in late]
        return self.finish(late, [DeadlineExceeded(f"no answer within {seconds:.3g} s") for seconds in given])

    def cancelled(self, rows: Sequence[Waiting]) -> None:
        """The callers of these rows have gone."""
        now = self._clock()
        for entry in rows:
            self._leave(entry, None, now)

    def _let_in(self, tenant: str, entries: Sequence[Waiting], backlog: Backlog, now: float) -> None:
        tokens = sum(entry.tokens for entry in entries)
        timeout_s = min(entry.deadline for entry in entries) - now
        error: AdapterRouterError | None = None
        if not timeout_s > 0:
            error = DeadlineExceeded(f"the row came with {timeout_s:.3g} s left")
        else:
            error = self._admission.refusal(tenant, len(entries), tokens, timeout_s, backlog)
        if error is not None:
            self._pressure.missed(len(entries), now)
            self._metrics.errors.labels(error.code).inc(len(entries))
            for entry in entries:
                entry.answer.set_result(error)
            return
        self._admission.entered(tenant, len(entries), tokens)
        self.tokens += tokens
        self._pressure.came(tokens, now)
        self._metrics.rows.inc(len(entries))

    def _leave(self, entry: Waiting, outcome: RowOutcome | None, now: float) -> None:
        self._admission.left(entry.tenant, 1, entry.tokens)
        self.tokens -= entry.tokens
        self._metrics.row_seconds.observe(now - entry.arrived)
        self._metrics.adapter_rows.inc(entry.version.adapter if entry.version else BASE_SERIES)
        if isinstance(outcome, AdapterRouterError):
            self._metrics.errors.labels(outcome.code).inc()
