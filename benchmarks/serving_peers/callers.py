"""Everybody who asks an application that cannot serve them all, and what each call brought."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from adapter_router.errors import AdapterRouterError, DeadlineExceeded, Overloaded
from adapter_router.types import Row, RowResult
from benchmarks.serving_peers.arrivals import TEXTS, Arrival, draw

ADAPTERS = 8
_TENANTS = 4
_PEAK_CALLERS = 16


@dataclass(frozen=True)
class Call:
    """One call as its caller saw it: when it was made and answered, in seconds of one clock; an outcome a row."""

    asked: float
    answered: float
    outcomes: Sequence[object]

    @property
    def seconds(self) -> float:
        return self.answered - self.asked

    def count(self, kind: type) -> int:
        """Rows with that outcome."""
        return sum(isinstance(outcome, kind) for outcome in self.outcomes)

    @property
    def admitted(self) -> int:
        """Rows that were not refused at once."""
        return self.count(RowResult) + self.count(DeadlineExceeded)


class Callers:
    """Everybody who asks, on one event loop. ``late``: how late each call was made, in seconds."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float, rows: int) -> None:
        self.timeout_s = timeout_s
        self.rows = rows
        self.late: list[float] = []
        self._handle = handle
        self._tenants = itertools.cycle(f"tenant-{number}" for number in range(_TENANTS))
        self._seed = 0

    async def peak(self, seconds: float) -> float:
        """Rows a second in a closed loop that leaves nobody idle."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        calls = self._calls(1e4 / seconds, seconds)
        done = []

        async def caller() -> None:
            while loop.time() < end:
                outcomes = await self._ask(next(calls))
                done.append((loop.time(), sum(isinstance(outcome, RowResult) for outcome in outcomes)))

        await asyncio.gather(*(caller() for _ in range(_PEAK_CALLERS)))
        return sum(rows for at, rows in done if at <= end) / seconds

    async def offer(self, rows_s: float, seconds: float) -> list[Call]:
        """Calls in open loop; returns when all have been answered."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        calls: list[Call] = []

        async def call(arrival: Arrival) -> None:
            asked = loop.time()
            self.late.append(asked - start - arrival.at)
            outcomes = await self._ask(arrival)
            calls.append(Call(asked, loop.time(), outcomes))

        async with asyncio.TaskGroup() as running:
            for arrival in self._calls(rows_s / self.rows, seconds):
                await asyncio.sleep(max(0.0, start + arrival.at - loop.time()))
                running.create_task(call(arrival))
        return calls

    def _calls(self, rate: float, seconds: float) -> Iterator[Arrival]:
        self._seed += 1
        return iter(draw("poisson", rate, seconds, ADAPTERS, self.rows, self._seed))

    async def _ask(self, arrival: Arrival) -> list[object]:
        tenant = next(self._tenants)
        rows = [Row(TEXTS[text], arrival.adapter, tenant=tenant, timeout_s=self.timeout_s) for text in arrival.texts]
        outcomes: list[object] = await self._handle.infer_many.remote(rows)
        unexpected = [
            outcome
            for outcome in outcomes
            if isinstance(outcome, AdapterRouterError) and not isinstance(outcome, (Overloaded, DeadlineExceeded))
        ]
        if unexpected:
            raise unexpected[0]
        return outcomes
