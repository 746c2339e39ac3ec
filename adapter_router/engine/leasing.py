"""Rows on their way, and which of them may run: those whose adapters are on the device and held there."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapter_router.catalog.mixing import spelled
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.residency import Residency
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

        Resident adapters at once, cold ones as the loader brings them in. No lease is held while waiting for one.
        """
        leased: dict[str, ResidentAdapter] = {}
        for digest, version in _versions(jobs).items():
            resident = self._residency.try_acquire(digest)
            if resident is not None:
                leased[digest] = resident
            else:
                self._residency.prefetch(version)
        bare = [job for job in jobs if job.version is None]
        ready, waiting = _split([job for job in jobs if job.version], leased)
        self._metrics.hits.inc(len(ready))
        self._metrics.misses.inc(len(waiting))
        with self._releasing(leased):
            if bare or ready:
                yield [*bare, *ready], leased
        while waiting:
            versions = _versions(waiting)
            first, version = versions.popitem()
            try:
                leased = {first: self._residency.acquire(version)}
            except AdapterRouterError as error:
                failed, waiting = _split(waiting, {first})
                yield failed, error
                continue
            with self._releasing(leased):
                for digest in versions:
                    resident = self._residency.try_acquire(digest)
                    if resident is not None:
                        leased[digest] = resident
                ready, waiting = _split(waiting, leased)
                yield ready, leased

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


def _versions(jobs: Sequence[Job]) -> dict[str, AdapterVersion]:
    return {job.version.digest: job.version for job in jobs if job.version}
