"""One forward pass for rows of many adapters: sort, plan, run, and hand every row its own output."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.plan import BatchPlan, PlanRow, sorted_order
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import Array, TaskKind

logger = logging.getLogger(__name__)

_MAX_OUTPUT_NUMBERS = 1 << 27  # of one pass: logits of many tokens over a large vocabulary
_PER_TOKEN = frozenset(
    {"token-classification", "question-answering", "embedding", "text-generation", "seq2seq-generation"}
)
_LABELLED = frozenset({"text-classification", "token-classification", "image-classification"})


@dataclass(frozen=True)
class Work:
    """One row on its way through the model; ``adapter`` None is the bare base."""

    encoded: EncodedRow
    adapter: ResidentAdapter | None
    task: TaskKind


Answer = TypeVar("Answer")
SomeWork = TypeVar("SomeWork", bound=Work)


class Forward:
    """The base model's forward pass; callers of any thread take turns."""

    def __init__(self, base: BaseModel, metrics: EngineMetrics) -> None:
        self._base = base
        self._metrics = metrics

    def run(self, works: Sequence[Work]) -> list[Array | InternalError]:
        """Each row's raw output, unpadded, in order."""
        answers: dict[int, Array | InternalError] = {}
        for indices in self._batches(works):
            found = bisected([works[index] for index in indices], self._run_once)
            answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(works))]

    def free(self, timeout_s: float) -> bool:
        """Whether the pass comes free within ``timeout_s``; False when one has been stuck that long."""
        free = self._base.lock.acquire(timeout=timeout_s)
        if free:
            self._base.lock.release()
        return free

    def _batches(self, works: Sequence[Work]) -> Iterator[list[int]]:
        """Row numbers that may share a pass: one shape, heads on one backbone, no adapter that must be alone."""
        tasks = sorted({work.task for work in works})
        together = self._base.may_share(tasks)
        groups: dict[object, list[int]] = {}
        for index, work in enumerate(works):
            alone = work.adapter.digest if work.adapter and work.adapter.solo else None
            key = (alone, work.encoded.shape_key, None if together and alone is None else work.task)
            groups.setdefault(key, []).append(index)
        for indices in groups.values():
            most = self._most_rows([works[index] for index in indices])
            yield from (indices[start : start + most] for start in range(0, len(indices), most))

    def _most_rows(self, works: Sequence[Work]) -> int:
        if not any(work.task in ("text-generation", "seq2seq-generation") for work in works):
            return len(works)
        longest = max(work.encoded.num_outputs for work in works)
        return max(1, _MAX_OUTPUT_NUMBERS // (longest * self._base.vocab_size))

    def _run_once(self, works: Sequence[Work]) -> list[Array | InternalError]:
        rows = [PlanRow(work.adapter, work.task, invocation_start(work)) for work in works]
        order = sorted_order(rows)
        chosen = [works[index].encoded for index in order]
        plan = BatchPlan([rows[index] for index in order], max(row.num_tokens for row in chosen))
        features = self._base.encoder.collate(chosen, self._base.device)
        with self._base.lock:
            start = time.perf_counter()
            padding = self._base.encoder.padding(chosen)
            outputs = [(s, raw.float().cpu().numpy()) for s, raw in self._base.forward(features, plan, padding)]
            self._metrics.forward_seconds.observe(time.perf_counter() - start)
        self._metrics.forwards.inc()
        self._metrics.forward_rows.observe(plan.num_rows)
        self._metrics.forward_adapters.observe(len(plan.segments))
        answers: list[Array | InternalError] = [InternalError("the model gave this row no output")] * len(works)
        for segment, raw in outputs:
            for position, row in zip(range(segment.start, segment.stop), raw, strict=True):
                answers[order[position]] = self._cut(row, works[order[position]])
        return answers

    def _cut(self, raw: Array, work: Work) -> Array | InternalError:
        """The row's own tokens and labels, without padding."""
        own = raw[: work.encoded.num_outputs] if work.task in _PER_TOKEN else raw
        if work.task in _LABELLED:
            labels = work.adapter.num_labels if work.adapter else self._base.task(work.task).spec.num_labels
            own = own[..., :labels]
        return own if np.isfinite(own).all() else InternalError("the model's output is not finite")


def bisected(
    works: Sequence[SomeWork], run: Callable[[Sequence[SomeWork]], list[Answer | InternalError]]
) -> list[Answer | InternalError]:
    """``run`` all of ``works``; when that raises, halves of them, so that only the row to blame fails."""
    try:
        return run(works)
    except Exception as error:
        if len(works) == 1:
            adapter = works[0].adapter
            logger.exception("a row of adapter %s failed", adapter.digest if adapter else None)
            return [InternalError(f"the forward pass failed: {type(error).__name__}")]
        logger.warning("a batch of %d rows failed, running its halves", len(works), exc_info=True)
        middle = len(works) // 2
        return bisected(works[:middle], run) + bisected(works[middle:], run)


def invocation_start(work: Work) -> int | None:
    """From which token on the row's adapter is active: the last place its invocation tokens stand (arXiv:2504.12397).

    A row without them is the bare base's: active from behind its end.
    """
    if work.adapter is None or not work.adapter.invocation:
        return None
    ids, wanted = work.encoded.features["input_ids"].tolist(), list(work.adapter.invocation)
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), NEVER)


NEVER = 1 << 40
"""A token position that no row reaches."""
