"""Rows on their way, and which of them may run: those whose adapters are on the device and held there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

from adapter_router.engine.jobs import Job, Key
from adapter_router.engine.loads import PATIENCE_S
from adapter_router.engine.residency import Residency
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import AdapterRouterError
from adapter_router.metrics import EngineMetrics


class Leases:
    """Brings rows and their adapters together."""

    def __init__(self, residency: Residency, metrics: EngineMetrics) -> None:
        self._residency = residency
        self._metrics = metrics

    def groups(
        self, jobs: Sequence[Job]
    ) -> Iterator[tuple[list[Job], dict[Key, ResidentAdapter] | AdapterRouterError]]:
        """``jobs`` in groups whose adapters are leased while the caller works on them, or with what keeps them out.

        Those in memory at once, cold ones as they come in. No lease is held while waiting for one.
        """
        waiting = [job for job in jobs if job.version]
        versions = {job.key: job.version for job in waiting if job.key and job.version}
        rows = Counter(job.key for job in waiting if job.key)
        tickets = self._residency.request(versions, rows)
        deadline = time.monotonic() + PATIENCE_S
        try:
            found = self._residency.collect(tickets)
            hits = sum(rows[key] for key, one in found.items() if isinstance(one, ResidentAdapter))
            self._metrics.hits.inc(hits)
            self._metrics.misses.inc(len(waiting) - hits)
            bare = [job for job in jobs if job.version is None]
            while bare or found or tickets:
                leased = {key: one for key, one in found.items() if isinstance(one, ResidentAdapter)}
                ready, waiting = _split(waiting, leased)
                with self._releasing(leased):
                    if bare or ready:
                        yield [*bare, *ready], leased
                for key, error in found.items():
                    if isinstance(error, AdapterRouterError):
                        failed, waiting = _split(waiting, {key})
                        yield failed, error
                bare = []
                found = self._residency.collect(tickets, deadline) if tickets else {}
        finally:
            self._residency.withdraw(tickets)

    @contextmanager
    def _releasing(self, leased: dict[Key, ResidentAdapter]) -> Iterator[None]:
        try:
            yield
        finally:
            for adapter in leased.values():
                self._residency.release(adapter.digest)


def _split(jobs: Sequence[Job], keys: Container[Key | None]) -> tuple[list[Job], list[Job]]:
    """Jobs whose adapter is among ``keys``, and the others."""
    return [job for job in jobs if job.key in keys], [job for job in jobs if job.key not in keys]
