"""Greedy generation for rows of many adapters: transformers' own loop over one static batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.forward import NEVER, Work, bisected, invocation_start
from adapter_router.engine.inputs import TextEncoder
from adapter_router.engine.plan import BatchPlan, PlanRow, sorted_order
from adapter_router.errors import InternalError

_CAUSAL = "text-generation"


@dataclass(frozen=True)
class GenerationWork(Work):
    """One row and how many tokens it may get."""

    max_new_tokens: int = 16


@dataclass(frozen=True)
class Generated:
    """New tokens, without the end token; ``stopped``: it came."""

    token_ids: tuple[int, ...]
    stopped: bool


class Generator:
    """Runs batches to their end; callers of any thread take turns."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def run(self, works: Sequence[GenerationWork]) -> Iterator[tuple[int, Generated | InternalError]]:
        """Each row's number and its tokens, batch by batch."""
        groups: dict[object, list[int]] = {}
        for index, work in enumerate(works):
            # A saved layer keeps its keys in the batch's one cache: it must have every row of it.
            alone = work.adapter is not None and (work.adapter.solo or work.adapter.caches)
            length = None if self._base.task(work.task).pads_left or work.task != _CAUSAL else work.encoded.num_tokens
            key = (work.task, work.adapter.digest if work.adapter and alone else None, length, work.encoded.is_long)
            groups.setdefault(key, []).append(index)
        for indices in _that_fit(groups.values(), works, self._base.encoder.max_tokens):
            found = bisected([works[index] for index in indices], self._run_once)
            yield from zip(indices, found, strict=True)

    def _run_once(self, works: Sequence[GenerationWork]) -> list[Generated | InternalError]:
        encoder = self._base.encoder
        assert isinstance(encoder, TextEncoder)
        lengths = [work.encoded.num_tokens for work in works]
        decoder_only = works[0].task == _CAUSAL
        rows = [self._plan_row(work, max(lengths)) for work in works]
        order = sorted_order(rows)
        plan = BatchPlan([rows[index] for index in order], max(lengths))
        chosen = [works[index].encoded for index in order]
        batch = encoder.collate(chosen, self._base.device, "left" if decoder_only else "right")
        features = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with self._base.lock:
            ids = self._base.generate(features, plan, max(work.max_new_tokens for work in works)).cpu().numpy()
        ids = ids[:, max(lengths) if decoder_only else 1 :]
        answers: list[Generated | InternalError] = [InternalError("the model generated nothing")] * len(works)
        for position, index in enumerate(order):
            answers[index] = self._finish(ids[position], works[index])
        return answers

    def _plan_row(self, work: Work, width: int) -> PlanRow:
        """Prompts end together, so that a shorter one begins later."""
        start = invocation_start(work)
        if start is not None and start != NEVER:
            start += width - work.encoded.num_tokens
        return PlanRow(work.adapter, work.task, start)

    def _finish(self, ids: np.ndarray, work: GenerationWork) -> Generated:
        ends = self._base.end_tokens(work.task)
        own = ids[: work.max_new_tokens].tolist()
        stop = next((place for place, token in enumerate(own) if token in ends), None)
        return Generated(tuple(own[:stop]), stop is not None)


def _that_fit(groups: Iterable[list[int]], works: Sequence[GenerationWork], limit: int) -> Iterator[list[int]]:
    """``groups``, each cut where its longest prompt and its most new tokens would not fit the model together."""
    for indices in groups:
        current: list[int] = []
        for index in sorted(indices, key=lambda i: works[i].encoded.num_tokens):
            joined = [works[i] for i in (*current, index)]
            longest = max(work.encoded.num_tokens for work in joined)
            if current and longest + max(work.max_new_tokens for work in joined) > limit:
                yield current
                current = []
            current.append(index)
        yield current
