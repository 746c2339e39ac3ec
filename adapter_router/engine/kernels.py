"""LoRA of many adapters in one pass: the grouped forward (SGMV/BGMV in the literature, Punica arXiv:2310.18547).

For every segment ``s`` of rows that share an adapter, with rows sorted by adapter::

    y[s] += (x[s] @ a_s) @ b_s        a_s: (in, rank_s)   b_s: (rank_s, out), scaling folded into b_s

in float32, whatever the base's dtype, rounded to it once. Neighbouring segments of one rank and one size run as one
pair of batched products; the plan sorts rows so that such segments are neighbours. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch


class LoraSegment(NamedTuple):
    """``num_rows`` adjacent rows of a sorted batch and their adapter's factors, float32.

    ``rank`` 0 stands for rows without LoRA in this place; their factors are empty.
    """

    num_rows: int
    rank: int
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


def add_lora(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment], scratch: Scratch) -> torch.Tensor:
    """``y`` (rows, …, out) plus each segment's LoRA of ``x`` (rows, …, in); may write ``y`` in place.

    ``segments`` cover all rows, in order.
    """
    wide_y, wide_x = y.float().contiguous(), x.float()
    start = 0
    for (num_rows, rank), run in groupby(segments, key=lambda segment: segment[:2]):
        members = list(run)
        stop = start + num_rows * len(members)
        if rank:
            # (segments, rows of a segment x tokens, features): one matrix for each adapter of the run.
            x_run = wide_x[start:stop].reshape(len(members), -1, x.shape[-1])
            y_run = wide_y[start:stop].view(len(members), -1, y.shape[-1])
            shrunk = torch.bmm(x_run, scratch.stack([segment.a for segment in members]))
            y_run.baddbmm_(shrunk, scratch.stack([segment.b for segment in members]))
        start = stop
    return wide_y.to(y.dtype)
