"""Grouped layers: base modules that give every row of the active plan its own adapter.

A grouped layer takes over the ``forward`` of the base's own module. Module tree, names and weights stay as
transformers built them, so the base can be compared byte for byte with its checkpoint at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adapter_router.engine.kernels import add_lora
from adapter_router.engine.plan import ActivePlan, BatchPlan, Segment


class GroupedLinear:
    """``y = module(x) + LoRA`` of each row's adapter, for ``nn.Linear`` and transformers' ``Conv1D``."""

    def __init__(self, module: nn.Module, path: str, active: ActivePlan) -> None:
        self._base_forward = module.forward
        self._path = path
        self._active = active
        module.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, …, in) -> (rows, …, out)."""
        y: torch.Tensor = self._base_forward(x)
        plan = self._active.plan
        segments = plan.lora(self._path) if plan else None
        if segments is None:
            return y
        _check_rows(self._path, x, plan)
        return add_lora(y, x, segments, self._active.scratch)


class GroupedModule:
    """A module of any kind that some adapters replace (``modules_to_save``): each row runs through its own copy.

    Copies may differ in the width of their output (numbers of labels): narrower rows are padded with NaN, which the
    engine cuts off again and which would be seen at once if it did not.
    """

    def __init__(self, module: nn.Module, path: str, active: ActivePlan) -> None:
        self._base_forward = module.forward
        self._path = path
        self._active = active
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the module's own; tensors with one entry a row are split by rows, everything else is passed on."""
        plan = self._active.plan
        groups = plan.heads(self._path) if plan else [(None, [])]
        if plan is None or groups == [(None, plan.segments)]:
            whole: torch.Tensor = self._base_forward(*args, **kwargs)
            return whole
        _check_rows(self._path, args[0] if args else next(iter(kwargs.values())), plan)
        outputs = []
        for head, segments in groups:
            own_args = [_select(value, segments, plan.num_rows) for value in args]
            own_kwargs = {name: _select(value, segments, plan.num_rows) for name, value in kwargs.items()}
            if head is not None:
                outputs.append((segments, head(*own_args, **own_kwargs)))
                continue
            # The base's own module may hold grouped layers: they must see just the rows it is given.
            with self._active.running(plan.narrowed(segments)):
                outputs.append((segments, self._base_forward(*own_args, **own_kwargs)))
        return _join(outputs, plan.num_rows)


def _check_rows(path: str, x: torch.Tensor, plan: BatchPlan | None) -> None:
    if plan is not None and x.shape[0] != plan.num_rows:
        raise RuntimeError(
            f"{path} got {x.shape[0]} rows, the plan has {plan.num_rows}: this architecture reshapes rows"
        )


def _select(value: Any, segments: Sequence[Segment], num_rows: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != num_rows:
        return value
    pieces = [value[s.start : s.stop] for s in segments]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _join(outputs: Sequence[tuple[Sequence[Segment], torch.Tensor]], num_rows: int) -> torch.Tensor:
    first = outputs[0][1]
    width = max(output.shape[-1] for _, output in outputs)
    joined = first.new_full((num_rows, *first.shape[1:-1], width), float("nan"))
    for segments, output in outputs:
        offset = 0
        for segment in segments:
            count = segment.stop - segment.start
            joined[segment.start : segment.stop, ..., : output.shape[-1]] = output[offset : offset + count]
            offset += count
    return joined
