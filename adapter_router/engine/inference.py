"""Rows in, outcomes out: encoded, brought together with their adapters, run, and read as answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.callers import Gone
from adapter_router.engine.encodings import Encodings
from adapter_router.engine.forward import Forward, Work
from adapter_router.engine.jobs import Job, Jobs
from adapter_router.engine.leasing import Leases
from adapter_router.errors import AdapterRouterError, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, Row, RowOutcome


class Inference:
    """Answers rows of any adapters of one base. Any thread may call it."""

    def __init__(
        self, base: BaseModel, jobs: Jobs, leases: Leases, forward: Forward, max_batch_rows: int, metrics: EngineMetrics
    ) -> None:
        self._base = base
        self._jobs = jobs
        self._leases = leases
        self._forward = forward
        self._max_batch_rows = max_batch_rows
        self._metrics = metrics

    def outcomes(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], gone: Gone) -> list[RowOutcome]:
        """One of each row, in order. A row that is ``gone`` when its turn comes has that as its outcome, and no part.

        It is asked before a row is encoded, and again once the model is free for it.
        """
        outcomes: dict[int, RowOutcome] = {}
        jobs = []
        encodings = Encodings(self._base.encoder)
        for index, (row, version) in enumerate(zip(rows, versions, strict=True)):
            error = gone(index)
            if error is not None:
                outcomes[index] = self._skip(error)
                continue
            try:
                jobs.append(self._jobs.job(index, row, version, encodings))
            except AdapterRouterError as refused:
                outcomes[index] = refused
        # Rows of like length share a forward, so that a long one costs the others little padding.
        jobs.sort(key=lambda job: job.encoded.num_tokens)
        for start in range(0, len(jobs), self._max_batch_rows):
            self._run(jobs[start : start + self._max_batch_rows], outcomes, gone)
        return [outcomes[index] for index in range(len(rows))]

    def _run(self, jobs: Sequence[Job], outcomes: dict[int, RowOutcome], gone: Gone) -> None:
        for group, leased in self._leases.groups(jobs):
            if isinstance(leased, AdapterRouterError):
                outcomes.update({job.index: leased for job in group})
                continue
            works = [Work(job.encoded, job.adapter(leased), job.task, partial(gone, job.index)) for job in group]
            for job, answer in zip(group, self._forward.run(works), strict=True):
                if isinstance(answer, InternalError):
                    outcomes[job.index] = answer
                elif isinstance(answer, AdapterRouterError):
                    outcomes[job.index] = self._skip(answer)
                else:
                    outcomes[job.index] = self._jobs.outcome(job, answer)

    def _skip(self, error: AdapterRouterError) -> AdapterRouterError:
        self._metrics.rows_skipped.labels(error.code).inc()
        return error
