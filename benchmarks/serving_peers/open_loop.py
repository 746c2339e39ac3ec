"""Requests start when they are due, whatever becomes of those before: one process, one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving_peers.arrivals import Arrival

Ask = Callable[[Arrival], Awaitable[object]]
"""One request, until it is answered. Raises when it is not."""

_HOPELESS = 8.0  # times what is under way at the limit (Little's law): then the rest is not even asked
_DRAIN_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """``latencies``: seconds from when each request was *due* until its answer, in order of size.

    ``unanswered`` failed, or were not asked any more since far too many were under way. ``lag_s``: the 99th percentile
    of how late requests were started: where that is not small, the generator is what was measured.
    """

    seconds: float
    latencies: Sequence[float]
    unanswered: int
    lag_s: float

    def quantile(self, q: float) -> float:
        """Of the latencies, in seconds; the unanswered took for ever."""
        index = int(q * (len(self.latencies) + self.unanswered))
        return self.latencies[index] if index < len(self.latencies) else float("inf")

    def goodput(self, limit_s: float) -> float:
        """Requests a second that were answered within ``limit_s``."""
        return sum(latency <= limit_s for latency in self.latencies) / self.seconds


async def offer(ask: Ask, arrivals: Sequence[Arrival], seconds: float, limit_s: float) -> Outcome:
    """Make all requests, and wait for those that are under way at the end."""
    loop = asyncio.get_running_loop()
    most = max(32.0, _HOPELESS * limit_s * len(arrivals) / seconds)
    latencies: list[float] = []
    lags: list[float] = []
    running: set[asyncio.Task[None]] = set()
    start = loop.time()

    async def request(arrival: Arrival) -> None:
        await ask(arrival)
        latencies.append(loop.time() - start - arrival.at)

    for arrival in arrivals:
        await asyncio.sleep(max(0.0, start + arrival.at - loop.time()))
        if len(running) > most:
            break
        lags.append(loop.time() - start - arrival.at)
        task = loop.create_task(request(arrival))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(set(running), timeout=_DRAIN_S)
    for task in running:
        task.cancel()
    lags.sort()
    latencies.sort()
    return Outcome(seconds, latencies, len(arrivals) - len(latencies), lags[int(0.99 * len(lags))])
