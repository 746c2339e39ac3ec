"""Grouped modules: base modules that give every row of the active plan its own adapter.

A grouped module takes over the ``forward`` of the base's own module. Module tree, names and weights stay as
transformers built them, so the base can be compared byte for byte with its checkpoint at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adapter_router.engine.deltas import Changes, change_for
from adapter_router.engine.plan import ActivePlan, BatchPlan, Segment
from adapter_router.engine.probe import RowArguments
from adapter_router.engine.resident import Head

Groups = Sequence[tuple[Head | None, Sequence[Segment]]]


class GroupedModule:
    """A module that some adapters change (``deltas``) or replace (``heads``).

    Replacements may differ in the width of their output (numbers of labels): narrower rows are padded with NaN, which
    the engine cuts off again and which would be seen at once if it did not.
    """

    def __init__(self, module: nn.Module, path: str, active: ActivePlan, rows: RowArguments | None) -> None:
        """``rows``: which arguments have entries for each row; None where rows cannot be told apart."""
        self._base_forward = module.forward
        self._change = change_for(module)
        self._path = path
        self._active = active
        self._rows = rows
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        plan = self._active.plan
        if plan is None:
            return self._base_forward(*args, **kwargs)
        groups = plan.groups(self._path)
        if groups is not None:
            return self._run_groups(plan, groups, args, kwargs)
        deltas = plan.deltas(self._path)
        if deltas is None:
            return self._base_forward(*args, **kwargs)
        self._check_rows(plan)
        blocks = plan if self._rows is not None else plan.as_one_block()
        return self._change(self._base_forward, args, kwargs, Changes(deltas, blocks, self._active.scratch))

    def _run_groups(self, plan: BatchPlan, groups: Groups, args: Any, kwargs: Any) -> Any:
        if len(groups) == 1:
            return self._run_head(groups[0][0], args, kwargs)
        self._check_rows(plan)
        assert self._rows is not None
        outputs = []
        for head, segments in groups:
            own_args, own_kwargs = self._rows.select(args, kwargs, segments, plan.num_rows)
            if head is not None:
                outputs.append((segments, self._run_head(head, own_args, own_kwargs)))
                continue
            # Those rows may have deltas here or deeper inside: they must see just themselves.
            with self._active.running(plan.narrowed(segments)):
                outputs.append((segments, self.forward(*own_args, **own_kwargs)))
        return _join(outputs, plan.num_rows)

    def _run_head(self, head: Any, args: Any, kwargs: Any) -> Any:
        # A head may be the base's own module with other parameters: it must not find its way back here.
        with self._active.running(None):
            return head(*args, **kwargs)

    def _check_rows(self, plan: BatchPlan) -> None:
        if self._rows is None and not plan.is_uniform:
            raise RuntimeError(f"{self._path} cannot tell rows apart, but the batch has {len(plan.segments)} adapters")


def _join(outputs: Sequence[tuple[Sequence[Segment], Any]], num_rows: int) -> Any:
    """Groups' answers, tensors or tuples of them, as the answer of all rows."""
    first = outputs[0][1]
    if not isinstance(first, tuple):
        return _join_tensors(outputs, num_rows)
    columns = [[(segments, answer[place]) for segments, answer in outputs] for place in range(len(first))]
    return tuple(None if column[0][1] is None else _join_tensors(column, num_rows) for column in columns)


def _join_tensors(outputs: Sequence[tuple[Sequence[Segment], torch.Tensor]], num_rows: int) -> torch.Tensor:
    first_segments, first = outputs[0]
    per_row = first.shape[0] // sum(s.stop - s.start for s in first_segments)
    width = max(output.shape[-1] for _, output in outputs)
    padding = float("nan") if first.is_floating_point() else 0  # indices are never ragged
    joined = first.new_full((num_rows * per_row, *first.shape[1:-1], width), padding)
    for segments, output in outputs:
        offset = 0
        for segment in segments:
            start, stop = segment.start * per_row, segment.stop * per_row
            joined[start:stop, ..., : output.shape[-1]] = output[offset : offset + stop - start]
            offset += stop - start
    return joined
