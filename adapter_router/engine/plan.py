"""Which rows of the running batch belong to which adapter. Built once a batch, read by every grouped layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

from adapter_router.engine.kernels import Scratch
from adapter_router.engine.resident import DeviceDelta, Head, ResidentAdapter
from adapter_router.types import TaskKind


@dataclass(frozen=True)
class PlanRow:
    """One row: its adapter (None is the bare base), its task, and from which token on an aLoRA adapter is active.

    ``active_from`` None: the whole row.
    """

    adapter: ResidentAdapter | None
    task: TaskKind
    active_from: int | None = None


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of a batch, all of one adapter and task; adapter None is the bare base."""

    start: int
    stop: int
    adapter: ResidentAdapter | None
    task: TaskKind


class BatchPlan:
    """Segments of a batch whose rows lie sorted by adapter. Immutable."""

    def __init__(self, rows: Sequence[PlanRow], width: int = 0) -> None:
        """``rows``: those of one adapter and task adjacent. ``width``: tokens of the padded batch."""
        self.rows = tuple(rows)
        self.num_rows = len(rows)
        self.width = width
        self.segments: list[Segment] = []
        start = 0
        for _, members in groupby(rows, key=lambda row: (id(row.adapter), row.task)):
            first, *others = members
            stop = start + 1 + len(others)
            self.segments.append(Segment(start, stop, first.adapter, first.task))
            start = stop
        self._masked = any(row.active_from is not None for row in rows)
        self._apart = {p for s in self.segments if s.adapter for p in (*s.adapter.heads, *s.adapter.isolated)}

    @property
    def is_uniform(self) -> bool:
        """Whether one adapter has all rows, so that it may act on whatever passes by."""
        return len(self.segments) == 1

    def deltas(self, path: str) -> list[DeviceDelta | None] | None:
        """What each segment's adapter changes at the module ``path``; None when nobody changes anything."""
        deltas = [s.adapter.deltas.get(path) if s.adapter else None for s in self.segments]
        return deltas if any(deltas) else None

    def groups(self, path: str) -> list[tuple[Head | None, list[Segment]]] | None:
        """Which rows go through the module ``path`` apart from others, and what runs there: an adapter's own, or None.

        None altogether when the base's module may have all rows at once.
        """
        if path not in self._apart:
            return None
        groups: list[tuple[Head | None, list[Segment]]] = []
        shared = []
        for segment in self.segments:
            adapter = segment.adapter
            if adapter is not None and path in adapter.heads:
                groups.append((adapter.heads[path], [segment]))
            elif adapter is not None and path in adapter.isolated:
                groups.append((None, [segment]))
            else:
                shared.append(segment)
        if shared:
            groups.insert(0, (None, shared))
        return None if len(groups) == 1 and groups[0][0] is None else groups

    def tasks(self) -> dict[TaskKind, list[Segment]]:
        """Segments by task."""
        groups: dict[TaskKind, list[Segment]] = {}
        for segment in self.segments:
            groups.setdefault(segment.task, []).append(segment)
        return groups

    def narrowed(self, segments: Sequence[Segment]) -> BatchPlan:
        """The plan of a batch that holds only ``segments``' rows."""
        return BatchPlan([row for s in segments for row in self.rows[s.start : s.stop]], self.width)

    def as_one_block(self) -> BatchPlan:
        """A uniform plan for tensors that have no entries by row."""
        assert self.is_uniform
        return BatchPlan(self.rows[:1], self.width)

    def token_mask(self, tokens: int, device: torch.device) -> torch.Tensor | None:
        """(rows, tokens, 1): 1 where a row's adapter is active; None when all are everywhere.

        Fewer tokens than the batch is wide are its last ones, or those generated after it.
        """
        if not self._masked:
            return None
        starts = [0 if row.active_from is None else row.active_from for row in self.rows]
        positions = torch.arange(tokens, device=device)
        if tokens != self.width:
            positions = positions + self.width - 1
        return (positions[None] >= torch.tensor(starts, device=device)[:, None]).unsqueeze(-1)


def sorted_order(rows: Sequence[PlanRow]) -> list[int]:
    """Row numbers in plan order: rows of one adapter adjacent, adapters of one rank and number of rows side by side."""
    counts = Counter(row.adapter.digest for row in rows if row.adapter)

    def place(index: int) -> tuple[int, int, str, str]:
        row = rows[index]
        if row.adapter is None:
            return (0, 0, "", row.task)
        return (row.adapter.max_rank, counts[row.adapter.digest], row.adapter.digest, row.task)

    return sorted(range(len(rows)), key=place)


class ActivePlan:
    """The plan of the forward that is running on one base model (None between forwards), and its scratch memory.

    Owned by one engine and read by that engine's layers, so two engines in one process do not meet.
    """

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
        self.scratch = Scratch()

    @contextmanager
    def running(self, plan: BatchPlan | None) -> Iterator[None]:
        """Make ``plan`` the active one, and the outer one again afterwards."""
        outer, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = outer
