"""LoRA of many adapters in one pass: the grouped forward (SGMV/BGMV in the literature, Punica arXiv:2310.18547).

For every segment ``s`` of rows that share an adapter, with rows sorted by adapter::

    y[s] += (x[s] @ a_s) @ b_s        a_s: (in, rank_s)   b_s: (rank_s, out), scaling folded into b_s

in float32, whatever the base's dtype, rounded to it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch


class LoraSegment(NamedTuple):
    """``num_rows`` adjacent rows of a sorted batch and their adapter's factors, float32; None: no LoRA here."""

    num_rows: int
    a: torch.Tensor | None  # (in, rank)
    b: torch.Tensor | None  # (rank, out)


def add_lora(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
    """``y`` (rows, …, out) plus each segment's LoRA of ``x`` (rows, …, in); may write ``y`` in place.

    ``segments`` cover all rows, in order.
    """
    wide = y.float().contiguous()
    # Many small launches cost a GPU more than stacking copies; on a CPU it is the other way round.
    add = add_stacked if y.is_cuda else add_segmented
    add(wide, x.float(), segments)
    return wide.to(y.dtype)


def add_segmented(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    """One pair of products per segment: any mix of ranks and segment sizes, no copies, no padding."""
    per_row = x[0].numel() // x.shape[-1]
    sizes = [segment.num_rows * per_row for segment in segments]
    x_parts = x.reshape(-1, x.shape[-1]).split(sizes)
    y_parts = y.view(-1, y.shape[-1]).split(sizes)
    for x_part, y_part, (_, a, b) in zip(x_parts, y_parts, segments, strict=True):
        if a is not None and b is not None:
            y_part.addmm_(torch.mm(x_part, a), b)


def add_stacked(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    """One pair of batched products per run of adjacent segments of equal rank; copies the factors once per row."""
    start = 0
    for rank, run in groupby(segments, key=lambda segment: None if segment.a is None else segment.a.shape[1]):
        members = list(run)
        num_rows = sum(segment.num_rows for segment in members)
        if rank is not None:
            a = torch.stack([s.a for s in members for _ in range(s.num_rows) if s.a is not None])
            b = torch.stack([s.b for s in members for _ in range(s.num_rows) if s.b is not None])
            x_run = x[start : start + num_rows].reshape(num_rows, -1, x.shape[-1])
            y_run = y[start : start + num_rows].view(num_rows, -1, y.shape[-1])
            y_run.baddbmm_(torch.bmm(x_run, a), b)
        start += num_rows
