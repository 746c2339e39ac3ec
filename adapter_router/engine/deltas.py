"""How each kind of module applies the deltas of a sorted batch. Formulas: ``adapters/delta.py``.

Everything is computed in float32 and rounded to the base's dtype once, as PEFT does for a single adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from adapter_router.engine.kernels import LoraSegment, Scratch, add_lora
from adapter_router.engine.plan import BatchPlan, Segment
from adapter_router.engine.resident import DeviceDelta

_NONE = torch.empty(0)


@dataclass(frozen=True)
class Changes:
    """What a sorted batch's adapters change at one module: a delta for each segment of ``plan``, or None."""

    deltas: Sequence[DeviceDelta | None]
    plan: BatchPlan
    scratch: Scratch

    def __iter__(self) -> Iterator[tuple[Segment, DeviceDelta]]:
        """The segments that are changed."""
        for segment, delta in zip(self.plan.segments, self.deltas, strict=True):
            if delta is not None:
                yield segment, delta

    def lora(self) -> list[LoraSegment]:
        """Every segment with its low-rank factors."""
        return [_lora_segment(s, d) for s, d in zip(self.plan.segments, self.deltas, strict=True)]


def _lora_segment(segment: Segment, delta: DeviceDelta | None) -> LoraSegment:
    count = segment.stop - segment.start
    if delta is None or delta.a is None or delta.b is None:
        return LoraSegment(count, 0, 1.0, _NONE, _NONE)
    return LoraSegment(count, delta.rank, delta.scaling, delta.a, delta.b)


Change = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any], Changes], torch.Tensor]


def change_for(module: nn.Module) -> Change:
    """How modules of this kind are changed: all others can only be shifted, as norms are by their bias."""
    if isinstance(module, nn.Linear | Conv1D):
        return change_linear
    if isinstance(module, nn.Embedding):
        return _EmbeddingChange(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _ConvChange(module)
    return _change_other


def change_linear(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    changes: Changes,
) -> torch.Tensor:
    """(rows x anything, …, in) -> (rows x anything, …, out)."""
    x = args[0] if args else kwargs["input"]
    if any(delta.input_scale is not None for _, delta in changes):
        x = _scaled_inputs(x, changes)
    base: torch.Tensor = run(x)
    y = base.float().contiguous()
    wide = x.float()
    # One block of entries a row, whatever the layer was given.
    y_rows, x_rows = (
        y.view(changes.plan.num_rows, -1, y.shape[-1]),
        wide.reshape(changes.plan.num_rows, -1, x.shape[-1]),
    )
    mask = changes.plan.token_mask(x_rows.shape[1], x.device)
    add_lora(y_rows, x_rows if mask is None else x_rows * mask, changes.lora(), changes.scratch)
    for segment, delta in changes:
        if delta.active_shift is not None and mask is not None:
            y_rows[segment.start : segment.stop] += delta.active_shift * mask[segment.start : segment.stop]
        if not delta.is_plain:
            _finish_linear(y_rows[segment.start : segment.stop], x_rows[segment.start : segment.stop], delta)
    return y.to(base.dtype)


def _scaled_inputs(x: torch.Tensor, changes: Changes) -> torch.Tensor:
    scaled = x.clone()
    rows = scaled.view(changes.plan.num_rows, -1, x.shape[-1])
    for segment, delta in changes:
        if delta.input_scale is not None:
            rows[segment.start : segment.stop] *= delta.input_scale.to(x.dtype)
    return scaled


def _finish_linear(y: torch.Tensor, x: torch.Tensor, delta: DeviceDelta) -> None:
    if delta.dense is not None:
        y += x @ delta.dense
    _gain_and_shift(y, delta)
    if delta.token_ids is not None and delta.token_rows is not None:
        y[..., delta.token_ids] = x @ delta.token_rows.t()


def _gain_and_shift(y: torch.Tensor, delta: DeviceDelta) -> None:
    if delta.gain is not None:
        y *= delta.gain
    if delta.shift is not None:
        y += delta.shift


def _change_other(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    changes: Changes,
) -> torch.Tensor:
    base: torch.Tensor = run(*args, **kwargs)
    y = base.float().clone(memory_format=torch.contiguous_format)
    rows = y.view(changes.plan.num_rows, -1, y.shape[-1])
    for segment, delta in changes:
        _gain_and_shift(rows[segment.start : segment.stop], delta)
    return y.to(base.dtype)


class _EmbeddingChange:
    """Replaced rows, LoRA and DoRA of an embedding table."""

    def __init__(self, module: nn.Embedding) -> None:
        # Some models scale what their table gives (Gemma): a replaced or added row is scaled with it.
        self._scale = float(getattr(module, "embed_scale", 1.0))

    def __call__(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        changes: Changes,
    ) -> torch.Tensor:
        ids: torch.Tensor = args[0] if args else kwargs["input"]
        base: torch.Tensor = run(*args, **kwargs)
        y = base.float().clone(memory_format=torch.contiguous_format)
        y_rows, id_rows = y.view(changes.plan.num_rows, -1, y.shape[-1]), ids.reshape(changes.plan.num_rows, -1)
        for segment, delta in changes:
            self._apply(y_rows[segment.start : segment.stop], id_rows[segment.start : segment.stop], delta)
        return y.to(base.dtype)

    def _apply(self, y: torch.Tensor, ids: torch.Tensor, delta: DeviceDelta) -> None:
        if delta.token_ids is not None and delta.token_rows is not None:
            places = torch.searchsorted(delta.token_ids, ids).clamp(max=len(delta.token_ids) - 1)
            hits = delta.token_ids[places] == ids
            y[hits] = delta.token_rows[places[hits]] * self._scale
        if delta.a is not None and delta.b is not None:
            y += functional.embedding(ids, delta.a) @ delta.b * (delta.scaling * self._scale)
        _gain_and_shift(y, delta)


class _ConvChange:
    """A convolution's LoRA is two convolutions: one like the base's to few channels, a pointwise one back."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self._module = module
        self._convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(module.kernel_size)]

    def __call__(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        changes: Changes,
    ) -> torch.Tensor:
        x: torch.Tensor = args[0] if args else kwargs["input"]
        per_row = x.shape[0] // changes.plan.num_rows
        if any(delta.input_scale is not None for _, delta in changes):
            x = x.clone()
            for segment, delta in changes:
                if delta.input_scale is not None:
                    channels = x[segment.start * per_row : segment.stop * per_row].transpose(1, -1)
                    channels *= delta.input_scale.to(x.dtype)
        base: torch.Tensor = run(x)
        y = base.float().clone(memory_format=torch.contiguous_format)
        for segment, delta in changes:
            rows = slice(segment.start * per_row, segment.stop * per_row)
            self._apply(y[rows], x[rows].float(), delta)
        return y.to(base.dtype)

    def _apply(self, y: torch.Tensor, x: torch.Tensor, delta: DeviceDelta) -> None:
        if delta.a is not None and delta.b is not None:
            shrunk = self._convolve(x, delta.a, stride=self._module.stride, padding=self._module.padding)
            y += self._convolve(shrunk, delta.b, groups=self._module.groups) * delta.scaling
        channels = y.transpose(1, -1)
        _gain_and_shift(channels, delta)
