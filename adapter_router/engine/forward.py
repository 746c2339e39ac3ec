"""One forward pass for rows of many adapters: sort, plan, run, and hand every row its own logits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import numpy as np

from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.plan import BatchPlan, sorted_order
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import Array

logger = logging.getLogger(__name__)


class Forward:
    """The base model's forward pass; callers of any thread take turns."""

    def __init__(self, base: BaseModel, metrics: EngineMetrics) -> None:
        self._base = base
        self._metrics = metrics
        self._lock = threading.Lock()

    def run(
        self, rows: Sequence[EncodedRow], adapters: Sequence[ResidentAdapter | None]
    ) -> list[Array | InternalError]:
        """Each row's logits, unpadded. When the pass raises, halves of it run, so that only the row to blame fails."""
        try:
            logits = self._run_once(rows, adapters)
        except Exception as error:
            if len(rows) == 1:
                logger.exception("a row of adapter %s failed", adapters[0].digest if adapters[0] else None)
                return [InternalError(f"the forward pass failed: {type(error).__name__}")]
            middle = len(rows) // 2
            return self.run(rows[:middle], adapters[:middle]) + self.run(rows[middle:], adapters[middle:])
        return [self._cut(row, adapter) for row, adapter in zip(logits, adapters, strict=True)]

    def free(self, timeout_s: float) -> bool:
        """Whether the pass comes free within ``timeout_s``; False when one has been stuck that long."""
        free = self._lock.acquire(timeout=timeout_s)
        if free:
            self._lock.release()
        return free

    def _run_once(self, rows: Sequence[EncodedRow], adapters: Sequence[ResidentAdapter | None]) -> Array:
        """Logits of (rows, widest head) in the caller's order."""
        order = sorted_order(adapters)
        plan = BatchPlan([adapters[row] for row in order])
        features = self._base.encoder.collate([rows[row] for row in order], self._base.device)
        with self._lock:
            start = time.perf_counter()
            logits = self._base.forward(features, plan).float().cpu().numpy()
            self._metrics.forward_seconds.observe(time.perf_counter() - start)
        self._metrics.forwards.inc()
        self._metrics.forward_rows.observe(plan.num_rows)
        self._metrics.forward_adapters.observe(len(plan.segments))
        unsorted = np.empty_like(logits)
        unsorted[order] = logits
        return unsorted

    def _cut(self, logits: Array, adapter: ResidentAdapter | None) -> Array | InternalError:
        own = logits[: adapter.num_labels if adapter else self._base.spec.num_labels]
        return own if np.isfinite(own).all() else InternalError("the model's output is not finite")
