"""LoRA of many adapters in one pass: the grouped forward (SGMV/BGMV in the literature, Punica arXiv:2310.18547).

For every segment ``s`` of rows that share an adapter, with rows sorted by adapter::

    y[s] += scaling_s * (x[s] @ a_s) @ b_s        a_s: (in, rank_s)   b_s: (rank_s, out)

in float32, whatever the base's dtype. Neighbouring segments of one rank and one size run as one pair of batched
products; the plan sorts rows so that such segments are neighbours. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch


class LoraSegment(NamedTuple):
    """``num_rows`` adjacent rows of a sorted batch and their adapter's factors, float32.

    ``rank`` 0 stands for rows without LoRA in this place; their factors are empty. ``scaling`` is 1 where it has been
    folded into ``b``, which costs nothing; kept apart it is applied as PEFT does, to the last bit.
    """

    num_rows: int
    rank: int
    scaling: float
    a: torch.Tensor  # (in, rank)
    b: torch.Tensor  # (rank, out)


class Scratch:
    """Memory in which factors are stacked, used again and again: it stays in cache, and no pages are mapped anew."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def stack(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """(matrices, rows, columns); valid until the next call."""
        first = matrices[0]
        size = len(matrices) * first.numel()
        if self._flat.numel() < size or self._flat.device != first.device:
            self._flat = torch.empty(size, dtype=first.dtype, device=first.device)
        stacked = self._flat[:size].view(len(matrices), *first.shape)
        torch.stack(tuple(matrices), out=stacked)
        return stacked


def add_lora(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment], scratch: Scratch) -> None:
    """Add each segment's LoRA of ``x`` (rows, …, in) to ``y`` (rows, …, out), in place; both float32.

    ``segments`` cover all rows, in order; ``y`` is contiguous.
    """
    start = 0
    for (num_rows, rank, scaling), run in groupby(segments, key=lambda segment: segment[:3]):
        members = list(run)
        stop = start + num_rows * len(members)
        if rank:
            # (segments, rows of a segment x tokens, features): one matrix for each adapter of the run.
            x_run = x[start:stop].reshape(len(members), -1, x.shape[-1])
            y_run = y[start:stop].view(len(members), -1, y.shape[-1])
            shrunk = torch.bmm(x_run, scratch.stack([segment.a for segment in members]))
            stacked = scratch.stack([segment.b for segment in members])
            if scaling == 1:
                y_run.baddbmm_(shrunk, stacked)
            else:
                y_run += torch.bmm(shrunk, stacked) * scaling
        start = stop
