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
from adapter_router.engine.probe import Batch
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import AdapterRouterError, InternalError
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
    """One row on its way through the model; ``adapter`` None is the bare base.

    ``gone``: why nobody waits for it any more; asked when its turn has come.
    """

    encoded: EncodedRow
    adapter: ResidentAdapter | None
    task: TaskKind
    gone: Callable[[], AdapterRouterError | None] = lambda: None


@dataclass(frozen=True)
class _Pass:
    """One pass of the model, ready to run. ``order``: numbers of the works in it, as they lie in the plan."""

    order: Sequence[int]
    plan: BatchPlan
    features: Batch
    padding: int | None


Answer = TypeVar("Answer")
SomeWork = TypeVar("SomeWork", bound=Work)


class Forward:
    """The base model's forward pass; callers of any thread take turns."""

    def __init__(self, base: BaseModel, metrics: EngineMetrics) -> None:
        self._base = base
        self._metrics = metrics

    def run(self, works: Sequence[Work]) -> list[Array | AdapterRouterError]:
        """Each row's raw output, unpadded, in order; InternalError where it failed, else why it was left out."""
        answers: dict[int, Array | AdapterRouterError] = {}
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

    def _run_once(self, works: Sequence[Work]) -> list[Array | AdapterRouterError]:
        made = self._pass(works, range(len(works)))
        with self._base.lock:
            gone = {index: error for index, work in enumerate(works) if (error := work.gone()) is not None}
            if len(gone) == len(works):
                return [gone[index] for index in range(len(works))]
            if gone:
                made = self._pass(works, [index for index in range(len(works)) if index not in gone])
            start = time.perf_counter()
            found = self._base.forward(made.features, made.plan, made.padding)
            outputs = [(segment, raw.float().cpu().numpy()) for segment, raw in found]
            self._metrics.forward_seconds.observe(time.perf_counter() - start)
        self._metrics.forwards.inc()
        self._metrics.forward_rows.observe(made.plan.num_rows)
        self._metrics.forward_adapters.observe(len(made.plan.segments))
        answers: list[Array | AdapterRouterError] = [InternalError("the model gave this row no output")] * len(works)
        for index, error in gone.items():
            answers[index] = error
        for segment, raw in outputs:
            for index, row in zip(made.order[segment.start : segment.stop], raw, strict=True):
                answers[index] = self._cut(row, works[index])
        return answers

    def _pass(self, works: Sequence[Work], indices: Sequence[int]) -> _Pass:
        """Those of ``works``; collated before the model is free, so that it need not wait for that."""
        rows = [PlanRow(works[index].adapter, works[index].task, invocation_start(works[index])) for index in indices]
        places = sorted_order(rows)
        order = [indices[place] for place in places]
        encoded = [works[index].encoded for index in order]
        plan = BatchPlan([rows[place] for place in places], max(row.num_tokens for row in encoded))
        encoder = self._base.encoder
        return _Pass(order, plan, encoder.collate(encoded, self._base.device), encoder.padding(encoded))

    def _cut(self, raw: Array, work: Work) -> Array | InternalError:
        """The row's own tokens and labels, without padding."""
        own = raw[: work.encoded.num_outputs] if work.task in _PER_TOKEN else raw
        if work.task in _LABELLED:
            labels = work.adapter.num_labels if work.adapter else self._base.task(work.task).spec.num_labels
            own = own[..., :labels]
        return own if np.isfinite(own).all() else InternalError("the model's output is not finite")


def bisected(
    works: Sequence[SomeWork], run: Callable[[Sequence[SomeWork]], list[Answer]]
) -> list[Answer | InternalError]:
    """``run`` all of ``works``; when that raises, halves of them, so that only the row to blame fails."""
    try:
        return [*run(works)]
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
