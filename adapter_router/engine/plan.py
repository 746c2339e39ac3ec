"""Which rows of the running batch belong to which adapter. Built once a batch, read by every grouped layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from adapter_router.engine.kernels import LoraSegment, Scratch
from adapter_router.engine.resident import ResidentAdapter

_NONE = torch.empty(0)


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of a batch, all of one adapter; None is the bare base."""

    start: int
    stop: int
    adapter: ResidentAdapter | None


class BatchPlan:
    """Segments of a batch whose rows lie sorted by adapter. Immutable."""

    def __init__(self, adapters: Sequence[ResidentAdapter | None]) -> None:
        """``adapters``: one a row, equal ones adjacent."""
        self.num_rows = len(adapters)
        self.segments: list[Segment] = []
        start = 0
        for _, rows in groupby(adapters, key=id):
            members = list(rows)
            self.segments.append(Segment(start, start + len(members), members[0]))
            start += len(members)

    def lora(self, path: str) -> list[LoraSegment] | None:
        """Every segment with its adapter's factors for the module ``path``; None when no adapter acts there."""
        factors = [s.adapter.lora.get(path) if s.adapter else None for s in self.segments]
        if not any(factors):
            return None
        return [
            LoraSegment(s.stop - s.start, f.rank, f.a, f.b) if f else LoraSegment(s.stop - s.start, 0, _NONE, _NONE)
            for s, f in zip(self.segments, factors, strict=True)
        ]

    def heads(self, path: str) -> list[tuple[nn.Module | None, list[Segment]]]:
        """Who runs the module ``path`` on which rows: an adapter's own copy, or None for the base's."""
        shared = [s for s in self.segments if s.adapter is None or path not in s.adapter.heads]
        own = [(s.adapter.heads[path], [s]) for s in self.segments if s.adapter and path in s.adapter.heads]
        return [(None, shared), *own] if shared else [*own]

    def narrowed(self, segments: Sequence[Segment]) -> BatchPlan:
        """The plan of a batch that holds only ``segments``' rows."""
        return BatchPlan([s.adapter for s in segments for _ in range(s.start, s.stop)])


def sorted_order(adapters: Sequence[ResidentAdapter | None]) -> list[int]:
    """Row numbers in plan order: rows of one adapter adjacent, adapters of one rank and number of rows side by side."""
    rows = Counter(adapter.digest for adapter in adapters if adapter)

    def place(row: int) -> tuple[int, int, str]:
        adapter = adapters[row]
        return (adapter.max_rank, rows[adapter.digest], adapter.digest) if adapter else (0, 0, "")

    return sorted(range(len(adapters)), key=place)


class ActivePlan:
    """The plan of the forward that is running on one base model (None between forwards), and its scratch memory.

    Owned by one engine and read by that engine's layers, so two engines in one process do not meet.
    """

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
        self.scratch = Scratch()

    @contextmanager
    def running(self, plan: BatchPlan) -> Iterator[None]:
        """Make ``plan`` the active one, and the outer one again afterwards."""
        outer, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = outer
