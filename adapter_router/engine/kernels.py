"""LoRA of many adapters in one pass: the grouped forward (SGMV/BGMV in the literature, Punica arXiv:2310.18547).

For every segment ``s`` of rows that share an adapter, with rows sorted by adapter::

    y[s] += (x[s] @ a_s) @ b_s        a_s: (in, rank_s)   b_s: (rank_s, out), scaling folded into b_s

in float32, whatever the base's dtype, rounded to it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch


@dataclass(frozen=True)
class LoraSegment:
    """Rows ``start`` to ``stop`` of a sorted batch and the factors of their adapter, on the device, float32."""

    start: int
    stop: int
    a: torch.Tensor  # (in, rank)
    b: torch.Tensor  # (rank, out)


def add_lora(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
    """``y`` (rows, …, out) plus each segment's LoRA of ``x`` (rows, …, in); may write ``y`` in place."""
    wide = y.float().contiguous()
    _accumulate(wide, x.float(), segments)
    return wide.to(y.dtype)


def _accumulate(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    # Many small launches cost a GPU more than stacking copies; on a CPU it is the other way round.
    if y.is_cuda:
        add_stacked(y, x, segments)
    else:
        add_segmented(y, x, segments)


def add_segmented(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    """One pair of products per segment: any mix of ranks and segment sizes, no copies, no padding."""
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        shrunk = x[rows].reshape(-1, x.shape[-1]) @ segment.a
        y[rows].view(-1, y.shape[-1]).addmm_(shrunk, segment.b)


def add_stacked(y: torch.Tensor, x: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    """One pair of batched products per run of adjacent segments of equal rank; copies the factors once per row."""
    for _, run in groupby(_adjacent(segments), key=lambda numbered: numbered[0]):
        members = [segment for _, segment in run]
        start, stop = members[0].start, members[-1].stop
        a = torch.stack([s.a for s in members for _ in range(s.start, s.stop)])
        b = torch.stack([s.b for s in members for _ in range(s.start, s.stop)])
        shrunk = torch.bmm(x[start:stop].reshape(stop - start, -1, x.shape[-1]), a)
        y[start:stop].view(stop - start, -1, y.shape[-1]).baddbmm_(shrunk, b)


def _adjacent(segments: Sequence[LoraSegment]) -> list[tuple[int, LoraSegment]]:
    """Segments with the number of their run: a run goes on while rows adjoin and ranks are equal."""
    numbered: list[tuple[int, LoraSegment]] = []
    run = 0
    for segment in segments:
        if numbered:
            last = numbered[-1][1]
            run += last.stop != segment.start or last.a.shape[1] != segment.a.shape[1]
        numbered.append((run, segment))
    return numbered
