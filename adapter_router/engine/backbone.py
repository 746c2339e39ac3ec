"""One backbone pass for the heads of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from adapter_router.engine.plan import Segment


class SharedBackbone:
    """Takes over a backbone's ``forward``: a head that calls it may be given an output computed before."""

    def __init__(self, backbone: nn.Module) -> None:
        self._base_forward = backbone.forward
        self._ready: Any = None
        backbone.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own."""
        return self._base_forward(*args, **kwargs) if self._ready is None else self._ready

    @contextmanager
    def answering(self, output: Any) -> Iterator[None]:
        """Answer every call with ``output``."""
        self._ready = output
        try:
            yield
        finally:
            self._ready = None


def rows_of(output: Any, segments: Sequence[Segment], num_rows: int) -> Any:
    """The part of a model's output that belongs to the rows of ``segments``."""
    if isinstance(output, torch.Tensor):
        if output.dim() == 0 or output.shape[0] != num_rows:
            return output
        return torch.cat([output[s.start : s.stop] for s in segments])
    if isinstance(output, ModelOutput):
        return type(output)(**{name: rows_of(value, segments, num_rows) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(rows_of(value, segments, num_rows) for value in output)
    return output
