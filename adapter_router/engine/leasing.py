"""Rows on their way, and which of them may run: those whose adapters are on the device and held there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapter_router.catalog.mixing import spelled
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.residency import PATIENCE_S, Residency
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tasks.answering import Answerer
from adapter_router.errors import AdapterRouterError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, Row, TaskKind


@dataclass(frozen=True)
class Job:
    """One encoded row on its way; ``version`` None is the bare base."""

    index: int
    row: Row
    task: TaskKind
    encoded: EncodedRow
    answer: Answerer
    version: AdapterVersion | None

    @property
    def name(self) -> str | None:
        """Who answers, as the caller knows it; a mix is spelled out."""
        return self.version.adapter if self.version else name_of(self.row)

    def adapter(self, leased: Mapping[str, ResidentAdapter]) -> ResidentAdapter | None:
        """Its adapter among ``leased``; None for the bare base."""
        return leased[self.version.digest] if self.version else None


def name_of(row: Row) -> str | None:
    """The name that ``row`` asks for; of a mix, all of it."""
    return row.adapter if isinstance(row.adapter, str | None) else spelled(row.adapter)


class Leases:
    """Brings rows and their adapters together."""

    def __init__(self, residency: Residency, metrics: EngineMetrics) -> None:
        self._residency = residency
        self._metrics = metrics

    def groups(
        self, jobs: Sequence[Job]
    ) -> Iterator[tuple[list[Job], dict[str, ResidentAdapter] | AdapterRouterError]]:
        """``jobs`` in groups whose adapters are leased while the caller works on them, or with what keeps them out.

        Those in memory at once, cold ones as they come in. No lease is held while waiting for one.
        """
        waiting = [job for job in jobs if job.version]
        versions = {job.version.digest: job.version for job in waiting if job.version}
        rows = Counter(job.version.digest for job in waiting if job.version)
        tickets = self._residency.request(versions, rows)
        deadline = time.monotonic() + PATIENCE_S
        try:
            found = self._residency.collect(tickets)
            hits = sum(rows[digest] for digest, one in found.items() if isinstance(one, ResidentAdapter))
            self._metrics.hits.inc(hits)
            self._metrics.misses.inc(len(waiting) - hits)
            bare = [job for job in jobs if job.version is None]
            while bare or found or tickets:
                leased = {digest: one for digest, one in found.items() if isinstance(one, ResidentAdapter)}
                ready, waiting = _split(waiting, leased)
                with self._releasing(leased):
                    if bare or ready:
                        yield [*bare, *ready], leased
                for digest, error in found.items():
                    if isinstance(error, AdapterRouterError):
                        failed, waiting = _split(waiting, {digest})
                        yield failed, error
                bare = []
                found = self._residency.collect(tickets, deadline) if tickets else {}
        finally:
            self._residency.withdraw(tickets)

    @contextmanager
    def _releasing(self, leased: dict[str, ResidentAdapter]) -> Iterator[None]:
        try:
            yield
        finally:
            for digest in leased:
                self._residency.release(digest)


def _split(jobs: Sequence[Job], digests: Container[str]) -> tuple[list[Job], list[Job]]:
    """Jobs whose adapter is among ``digests``, and the others."""
    ready = [job for job in jobs if job.version and job.version.digest in digests]
    return ready, [job for job in jobs if not (job.version and job.version.digest in digests)]
