"""The engine: any mix of adapters in one forward pass of one base model, each row exactly as if alone."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from adapter_router.adapters.convert import idle_modules, norms
from adapter_router.adapters.validate import Request
from adapter_router.catalog.addressing import each_version
from adapter_router.catalog.names import Names
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.callers import Callers, Gone
from adapter_router.engine.continuations import Continuations
from adapter_router.engine.encodings import Encodings
from adapter_router.engine.forward import Forward
from adapter_router.engine.inference import Inference
from adapter_router.engine.jobs import Job, Jobs, name_of
from adapter_router.engine.leasing import Leases
from adapter_router.engine.reading import Loaded, Obtain, admitted_copy
from adapter_router.engine.residency import Residency
from adapter_router.errors import AdapterRejected, AdapterRouterError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import (
    TASK_KINDS,
    AdapterVersion,
    BaseInfo,
    Capacity,
    GenerationEvent,
    HeldAdapter,
    LoadReport,
    ReplicaLoad,
    ResidencyChange,
    Row,
    RowOutcome,
    TaskKind,
)

logger = logging.getLogger(__name__)


class Engine:
    """One base model and the adapters on it. Every method may be called from any thread."""

    def __init__(self, config: EngineConfig, obtain: Obtain = admitted_copy) -> None:
        """Load the base. Raises ValueError or OSError when it cannot be had as configured.

        ``obtain``: finds this node's copy of a cold adapter, or fetches it; called by many threads at once.
        """
        self.config = config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._scratch = None if config.store_dir else tempfile.mkdtemp(prefix="adapter-router-")
        self._store = ContentStore(Path(config.store_dir or self._scratch or ""), config.adapter_memory_bytes)
        self.base = BaseModel(config)
        self.metrics = EngineMetrics()
        self.metrics.base_bytes.set(self.base.num_bytes)
        self._residency = Residency(self.base, config, obtain, self.metrics)
        leases = Leases(self._residency, self.metrics)
        self._catalog = Names()
        self._forward = Forward(self.base, self.metrics)
        self._jobs = Jobs(self.base)
        self._inference = Inference(self.base, self._jobs, leases, self._forward, config.max_batch_rows, self.metrics)
        self._continuations = Continuations(self.base, leases)

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

        ``task`` where the directory does not tell it; ``labels`` overrides the names in its ``config.json``. Raises
        AdapterExists when the name is taken and AdapterRejected with every problem, in both cases without effect.
        """
        self._catalog.check_name(adapter)
        stored = self._store.admit(directory)
        try:
            report = self.admit(adapter, stored, task, labels)
            self._catalog.add(report.version)
        finally:
            self._store.settle(stored, keep=self._catalog.holds(stored.digest))
        return report

    def unload_adapter(self, adapter: str) -> None:
        """Forget ``adapter``; rows already accepted finish. Raises AdapterNotFound."""
        version = self._catalog.remove(adapter)
        if not self._catalog.holds(version.digest):
            self.evict(version.digest)

    def admit(
        self,
        adapter: str,
        stored: StoredAdapter,
        task: TaskKind | None = None,
        labels: Sequence[str] | None = None,
        keep: bool = True,
    ) -> LoadReport:
        """Check ``stored`` against the base, without registering a name for it, and if ``keep`` make it resident.

        One that is not kept evicts nobody. Raises AdapterRejected with every problem.
        """
        if task is not None and task not in TASK_KINDS:
            raise AdapterRejected.because([f"task {task!r} is not served; served are {', '.join(TASK_KINDS)}"])
        request = Request(task, tuple(labels) if labels is not None else None)
        loaded = self._residency.admit(stored, request, keep=keep)
        tensors, spec = loaded.tensors, self.base.task(loaded.tensors.task).spec
        version = AdapterVersion(
            adapter,
            stored.digest,
            stored.directory,
            tensors.task,
            tensors.labels,
            tensors.activation,
            tensors.embedding,
            brings_head=any(spec.is_head(path) for path in (*tensors.saved, *tensors.replaced)),
            num_bytes=loaded.num_bytes,
            base=self.base.fingerprint,
        )
        report = _report(version, loaded)
        logger.info("adapter %s %s: %d modules", adapter, stored.digest, len(report.modules))
        return report

    def warm(self, version: AdapterVersion) -> None:
        """Make an adapter resident, and wait for it. Raises what keeps it from being served."""
        self._residency.acquire(version)
        self._residency.release(version.digest)

    def prefetch(self, version: AdapterVersion) -> None:
        """Start making an adapter resident; what goes wrong is told to the rows that ask for it."""
        self._residency.prefetch(version)

    def pin(self, version: AdapterVersion) -> None:
        """Make an adapter resident and never evict it.

        Raises as ``warm``, and InvalidRequest where pinned adapters hold their share of the memory already.
        """
        self._residency.pin(version)

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self._residency.unpin(digest)

    def evict(self, digest: str) -> None:
        """Free the memory of an adapter, pinned or not; it is read again when a row asks for it."""
        self._residency.drop(digest)

    def resident(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        return self._residency.resident()

    def changes(self, since: int) -> ResidencyChange:
        """Whose rows would run at once now and would not have at revision ``since``, and the other way round.

        Revision 0 is that of an empty engine.
        """
        return self._residency.changes(since)

    def residency(self) -> list[HeldAdapter]:
        """Every adapter in memory."""
        return self._residency.held()

    def capacity(self) -> Capacity:
        """How much of the memory for adapters is taken."""
        return self._residency.capacity()

    def load(self) -> ReplicaLoad:
        """How busy it has been with adapters of late; ``rows`` is its caller's to fill in."""
        return self._residency.load()

    @property
    def load_s(self) -> float:
        """Running mean of the time an adapter takes to load."""
        return self._residency.load_s

    def info(self) -> BaseInfo:
        """The base model as others need to know it."""
        own = self.base.spec
        return BaseInfo(
            name=self.config.base,
            fingerprint=self.base.fingerprint,
            model_type=own.model_type,
            tasks=self.base.tasks,
            labels=None if own.untrained else own.labels,
            max_tokens=self.base.encoder.max_tokens,
        )

    def check_forward(self, timeout_s: float) -> bool:
        """Whether the forward pass is free within ``timeout_s``: False when one has been stuck that long."""
        return self._forward.free(timeout_s)

    # -- rows ----------------------------------------------------------------------------------------------------

    def infer(self, rows: Sequence[Row]) -> list[RowOutcome]:
        """Answer ``rows`` in order; a row that failed has its error in its place."""
        found = each_version(rows, self._catalog.find)
        known = [(row, v) for row, v in zip(rows, found, strict=True) if not isinstance(v, AdapterRouterError)]
        answered = iter(self.infer_versions([row for row, _ in known], [v for _, v in known]) if known else ())
        return [v if isinstance(v, AdapterRouterError) else next(answered) for v in found]

    def infer_versions(
        self, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], gone: Gone | None = None
    ) -> list[RowOutcome]:
        """``infer`` with the version of each row named by the caller; None is the bare base.

        ``gone`` says why nobody waits for a row any more, which then has that as its outcome and takes no part in the
        forward; by default when its ``timeout_s`` is over, counted from this call.
        """
        self.metrics.calls.inc()
        return self._inference.outcomes(rows, versions, gone or Callers(rows).gone)

    def generate(self, rows: Sequence[Row]) -> Iterator[GenerationEvent]:
        """Continue ``rows`` greedily; one event a row, when its batch is done. A row that failed is an event, too."""
        jobs: list[Job] = []
        encodings = Encodings(self.base.encoder)
        for index, row in enumerate(rows):
            try:
                found = self._catalog.find(row.adapter, row.head)
                if isinstance(found, AdapterRouterError):
                    raise found
                job = self._jobs.job(index, row, found, encodings)
                self._continuations.check(job)
                jobs.append(job)
            except AdapterRouterError as error:
                yield GenerationEvent(index, adapter=name_of(row), error=error)
        for start in range(0, len(jobs), self.config.max_batch_rows):
            yield from self._continuations.events(jobs[start : start + self.config.max_batch_rows])


def _report(version: AdapterVersion, loaded: Loaded) -> LoadReport:
    sizes = norms(loaded.converted.delta)
    return LoadReport(
        version=version,
        tensors_applied=loaded.tensors.num_tensors,
        modules=tuple(sizes),
        ranks=tuple(sorted({target.config.rank_of(target.path) for target in loaded.tensors.targets})),
        num_bytes=loaded.num_bytes,
        norms=sizes,
        warnings=(*loaded.converted.warnings, *idle_modules(sizes)),
    )
