"""The engine: any mix of adapters in one forward pass of one base model, each row exactly as if alone."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from adapter_router.adapters.validate import AdapterTensors
from adapter_router.catalog.adapters import Catalog
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.forward import Forward
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.residency import Residency
from adapter_router.engine.resident import ResidentAdapter, device_bytes
from adapter_router.engine.tasks import classify
from adapter_router.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterRouterError,
    InternalError,
    TaskMismatch,
)
from adapter_router.metrics import EngineMetrics
from adapter_router.types import (
    TASK_KINDS,
    AdapterVersion,
    Array,
    BaseInfo,
    LoadReport,
    Row,
    RowOutcome,
    RowResult,
    TaskKind,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One encoded row on its way; ``version`` None is the bare base."""

    index: int
    row: Row
    encoded: EncodedRow
    version: AdapterVersion | None


class Engine:
    """One base model and the adapters on it. Every method may be called from any thread."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the base. Raises ValueError or OSError when it cannot be had as configured."""
        self.config = config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._scratch = None if config.store_dir else tempfile.mkdtemp(prefix="adapter-router-")
        self._store = ContentStore(Path(config.store_dir or self._scratch or ""))
        self.base = BaseModel(config)
        self.metrics = EngineMetrics()
        self._residency = Residency(self.base, config.adapter_memory_bytes, self.metrics)
        self._catalog = Catalog()
        self._forward = Forward(self.base, self.metrics)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop loading and free memory and scratch files."""
        self._residency.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # -- adapters ------------------------------------------------------------------------------------------------

    def load_adapter(
        self, adapter: str, directory: str | Path, task: TaskKind | None = None, labels: Sequence[str] | None = None
    ) -> LoadReport:
        """Register the PEFT directory ``directory`` as ``adapter`` and make it resident.

        ``labels`` overrides the names in the directory's ``config.json``. Raises AdapterExists when the name is
        taken and AdapterRejected with every problem, in both cases without effect.
        """
        self._catalog.check_name(adapter)
        report = self.admit(adapter, self._store.admit(directory), task, labels)
        self._catalog.add(report.version)
        return report

    def unload_adapter(self, adapter: str) -> None:
        """Forget ``adapter``; rows already accepted finish. Raises AdapterNotFound."""
        version = self._catalog.remove(adapter)
        if not self._catalog.holds(version.digest):
            self.evict(version.digest)

    def admit(
        self, adapter: str, stored: StoredAdapter, task: TaskKind | None = None, labels: Sequence[str] | None = None
    ) -> LoadReport:
        """Check ``stored`` against the base and make it resident, without registering a name for it.

        Raises AdapterRejected with every problem.
        """
        if task is not None and task not in TASK_KINDS:
            raise AdapterRejected.because([f"task {task!r} is not served; served are {', '.join(TASK_KINDS)}"])
        tensors = self._residency.register(stored, tuple(labels) if labels is not None else None)
        version = AdapterVersion(
            adapter, stored.digest, stored.directory, task or "text-classification", tensors.labels, tensors.activation
        )
        logger.info("adapter %s %s: %d modules", adapter, stored.digest, len(tensors.pairs) + len(tensors.saved))
        return self._report(version, tensors)

    def evict(self, digest: str) -> None:
        """Free the device memory of an idle adapter; it is read again when a row asks for it."""
        self._residency.drop(digest)

    def resident(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        return self._residency.resident()

    @property
    def load_s(self) -> float:
        """Running mean of the time an adapter takes to load."""
        return self._residency.load_s

    def info(self) -> BaseInfo:
        """The base model as others need to know it."""
        labels = None if self.base.spec.untrained else self.base.labels
        return BaseInfo(
            self.config.base, self.base.fingerprint, self.base.spec.model_type, labels, self.base.encoder.max_tokens
        )

    def check_forward(self, timeout_s: float) -> bool:
        """Whether the forward pass is free within ``timeout_s``: False when one has been stuck that long."""
        return self._forward.free(timeout_s)

    # -- rows ----------------------------------------------------------------------------------------------------

    def infer(self, rows: Sequence[Row]) -> list[RowOutcome]:
        """Answer ``rows`` in order; a row that failed has its error in its place."""
        found = [self._catalog.find(row.adapter) for row in rows]
        known = [
            (row, version) for row, version in zip(rows, found, strict=True) if not isinstance(version, AdapterNotFound)
        ]
        answered = iter(self.infer_versions(*zip(*known, strict=True)) if known else ())
        return [version if isinstance(version, AdapterNotFound) else next(answered) for version in found]

    def infer_versions(self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None]) -> list[RowOutcome]:
        """``infer`` with the version of each row named by the caller; None is the bare base."""
        self.metrics.calls.inc()
        outcomes: dict[int, RowOutcome] = {}
        jobs = []
        for index, (row, version) in enumerate(zip(rows, versions, strict=True)):
            try:
                jobs.append(self._encode(index, row, version))
            except AdapterRouterError as error:
                outcomes[index] = error
            except Exception as error:
                logger.exception("a row of adapter %s cannot be encoded", row.adapter)
                outcomes[index] = InternalError(f"the row cannot be encoded: {type(error).__name__}")
        # Rows of like length share a forward, so that a long one costs the others little padding.
        jobs.sort(key=lambda job: job.encoded.num_tokens)
        for start in range(0, len(jobs), self.config.max_batch_rows):
            self._run(jobs[start : start + self.config.max_batch_rows], outcomes)
        return [outcomes[index] for index in range(len(rows))]

    def _encode(self, index: int, row: Row, version: AdapterVersion | None) -> _Job:
        task = version.task if version else "text-classification"
        if row.task is not None and row.task != task:
            raise TaskMismatch(f"adapter {row.adapter!r} serves {task}, not {row.task}", "task")
        if version is None and self.base.spec.untrained:
            raise TaskMismatch("the bare base has no trained head for text-classification; name an adapter", "adapter")
        return _Job(index, row, self.base.encoder.encode(row), version)

    def _run(self, jobs: Sequence[_Job], outcomes: dict[int, RowOutcome]) -> None:
        """Answer ``jobs``: resident adapters at once, cold ones as the loader brings them in."""
        leased: dict[str, ResidentAdapter] = {}
        for digest, version in _versions(jobs).items():
            resident = self._residency.try_acquire(digest)
            if resident is not None:
                leased[digest] = resident
            else:
                self._residency.prefetch(version)
        bare = [job for job in jobs if job.version is None]
        ready, waiting = _split([job for job in jobs if job.version], leased)
        self.metrics.hits.inc(len(ready))
        self.metrics.misses.inc(len(waiting))
        self._forward_leased([*bare, *ready], leased, outcomes)
        while waiting:
            waiting = self._run_cold(waiting, outcomes)

    def _run_cold(self, jobs: Sequence[_Job], outcomes: dict[int, RowOutcome]) -> list[_Job]:
        """Wait for one adapter, answer its rows and those of whatever else has come in; returns the rest."""
        versions = _versions(jobs)
        first, version = versions.popitem()
        leased: dict[str, ResidentAdapter] = {}
        try:
            leased[first] = self._residency.acquire(version)
        except AdapterRouterError as error:
            failed, rest = _split(jobs, {first})
            outcomes.update({job.index: error for job in failed})
            return rest
        for digest in versions:
            resident = self._residency.try_acquire(digest)
            if resident is not None:
                leased[digest] = resident
        ready, rest = _split(jobs, leased)
        self._forward_leased(ready, leased, outcomes)
        return rest

    def _forward_leased(
        self, jobs: Sequence[_Job], leased: dict[str, ResidentAdapter], outcomes: dict[int, RowOutcome]
    ) -> None:
        try:
            adapters = [leased[job.version.digest] if job.version else None for job in jobs]
            answers = self._forward.run([job.encoded for job in jobs], adapters) if jobs else []
            for job, answer in zip(jobs, answers, strict=True):
                outcomes[job.index] = answer if isinstance(answer, InternalError) else self._result(job, answer)
        finally:
            for digest in leased:
                self._residency.release(digest)

    def _result(self, job: _Job, logits: Array) -> RowResult:
        version = job.version
        activation = version.activation if version else self.base.activation
        if job.row.parameters.get("use_activation") is False:
            activation = "none"
        labels = version.labels if version else self.base.labels
        digest = version.digest if version else self.base.fingerprint
        output = classify(logits, labels, activation)
        return RowResult(output, logits, job.row.adapter, digest, job.encoded.num_tokens)

    def _report(self, version: AdapterVersion, tensors: AdapterTensors) -> LoadReport:
        saved = sum(len(parameters) for parameters in tensors.saved.values())
        return LoadReport(
            version=version,
            tensors_applied=2 * len(tensors.pairs) + saved,
            modules=(*tensors.pairs, *tensors.saved),
            ranks=tuple(sorted({pair.rank for pair in tensors.pairs.values()})),
            num_bytes=device_bytes(tensors, self.base.dtype),
            warnings=tensors.warnings,
        )


def _split(jobs: Sequence[_Job], digests: Container[str]) -> tuple[list[_Job], list[_Job]]:
    """Jobs whose adapter is among ``digests``, and the others."""
    ready = [job for job in jobs if job.version and job.version.digest in digests]
    return ready, [job for job in jobs if not (job.version and job.version.digest in digests)]


def _versions(jobs: Sequence[_Job]) -> dict[str, AdapterVersion]:
    return {job.version.digest: job.version for job in jobs if job.version}
