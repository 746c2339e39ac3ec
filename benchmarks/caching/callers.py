"""A closed loop: so many callers, each of whom asks again as soon as it has its answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.caching.tally import LOAD_S, Tally
from benchmarks.caching.traces import is_one_off

CALLERS = 8

Ask = Callable[[str], Awaitable[object]]
"""One request for one adapter."""


@dataclass(frozen=True)
class Figures:
    """Of one contender and one trace. One-off adapters count in nothing but times and balance.

    ``hit_rate``: 1 - loads / requests; a request that joins a load in flight costs none. ``at_once``: the share of
    requests answered sooner than a load takes. ``balance``: the busiest replica's share of rows.
    """

    hit_rate: float
    at_once: float
    loads_per_1000: float
    p50_ms: float
    p99_ms: float
    requests_per_s: float
    balance: float


async def closed_loop(ask: Ask, trace: Sequence[str]) -> tuple[list[tuple[str, float]], float]:
    """Adapter and seconds of every request, and the seconds of all together."""
    loop = asyncio.get_running_loop()
    coming = iter(trace)
    answered = []

    async def caller() -> None:
        for adapter in coming:
            start = loop.time()
            await ask(adapter)
            answered.append((adapter, loop.time() - start))

    start = loop.time()
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
    return answered, loop.time() - start


def figures(answered: Sequence[tuple[str, float]], seconds: float, tallies: Collection[Tally]) -> Figures:
    """Sum up; replicas must have seen every request once."""
    assert sum(tally.rows for tally in tallies) == len(answered)
    requests = sum(not is_one_off(adapter) for adapter, _ in answered)
    loads = Counter[str]()
    for tally in tallies:
        loads += tally.loads
    counted = sum(count for adapter, count in loads.items() if not is_one_off(adapter))
    milliseconds = sorted(1e3 * latency for _, latency in answered)
    return Figures(
        hit_rate=1 - counted / requests,
        at_once=sum(one < LOAD_S for name, one in answered if not is_one_off(name)) / requests,
        loads_per_1000=1e3 * counted / requests,
        p50_ms=milliseconds[len(milliseconds) // 2],
        p99_ms=milliseconds[int(len(milliseconds) * 0.99)],
        requests_per_s=len(answered) / seconds,
        balance=max(tally.rows for tally in tallies) / len(answered),
    )
