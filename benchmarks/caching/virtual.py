"""The contenders in virtual time: an event loop whose clock jumps to the next timer, and peers that behave as Ray's.

Nothing of ours is imitated: dispatcher, affinity, slots and popularity are the real ones, and only wait otherwise.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from adapter_router.config import RoutingConfig
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.dispatcher import Dispatcher
from adapter_router.routing.replica_state import Member
from adapter_router.types import AdapterVersion, Row, RowResult, ShardReply
from benchmarks.caching.callers import Figures, closed_loop, figures
from benchmarks.caching.choices import bounded_rendezvous, rendezvous, version
from benchmarks.caching.multiplexed import Lookalike
from benchmarks.caching.replicas import SleepingReplica
from benchmarks.caching.tally import REPLICAS

_HOP_S = 0.002  # each way
_NAMES = [f"replica{index}" for index in range(REPLICAS)]
_PUSH_S = 0.1  # how often Serve's replicas tell of the models they hold
_BROADCAST_S = 0.05  # until the routers know
_BACKOFF_S = 0.025


def measure(contender: str, trace: Sequence[str]) -> Figures:
    """One contender's figures for one trace: the same every time."""
    loop = _VirtualLoop()
    try:
        return loop.run_until_complete(_CONTENDERS[contender](trace))
    finally:
        loop.close()


class _VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits: when nothing is ready, time moves on to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]  # asyncio's own, and its only way to wait
        poll = selector.select

        def select(timeout: float | None) -> Any:
            if timeout is None:
                raise RuntimeError("everybody waits for somebody else")
            self._seconds += timeout
            return poll(0)

        selector.select = select

    def time(self) -> float:
        return self._seconds


class _Replicas:
    """Those of one run, a hop away."""

    def __init__(self) -> None:
        self.by_name = {name: SleepingReplica(name, ours=True) for name in _NAMES}

    def members(self) -> Sequence[Member]:
        return [Member(name, name) for name in self.by_name]

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply:
        await asyncio.sleep(_HOP_S)
        reply = await self.by_name[replica].infer(rows, versions, known)
        await asyncio.sleep(_HOP_S)
        return reply

    async def warm(self, replica: str, version: AdapterVersion) -> None:
        await self.by_name[replica].warm(version.adapter)


async def _ours(trace: Sequence[str]) -> Figures:
    replicas = _Replicas()
    clock = asyncio.get_running_loop().time
    dispatcher = Dispatcher(replicas, RoutingConfig(), RouterMetrics(), clock=clock)

    async def ask(adapter: str) -> None:
        (outcome,) = await dispatcher.submit([(Row("", adapter), version(adapter))])
        assert isinstance(outcome, RowResult), outcome

    answered, seconds = await closed_loop(ask, trace)
    await dispatcher.close()
    return figures(answered, seconds, [replica.tally for replica in replicas.by_name.values()])


async def _consistent_hash(trace: Sequence[str]) -> Figures:
    """A ring with very many virtual nodes is what rendezvous hashing is."""
    replicas = [Lookalike(name) for name in _NAMES]
    return await _chosen(trace, replicas, lambda adapter, in_flight: rendezvous(adapter, in_flight)[0])


async def _bounded_rendezvous(trace: Sequence[str]) -> Figures:
    replicas = [Lookalike(name) for name in _NAMES]
    return await _chosen(trace, replicas, bounded_rendezvous)


async def _lru(trace: Sequence[str]) -> Figures:
    replicas = [SleepingReplica(name, ours=False) for name in _NAMES]
    return await _chosen(trace, replicas, lambda adapter, in_flight: rendezvous(adapter, in_flight)[0])


async def _chosen(
    trace: Sequence[str],
    fleet: Sequence[SleepingReplica] | Sequence[Lookalike],
    choose: Callable[[str, dict[str, int]], str],
) -> Figures:
    """One request, one call, to the replica that ``choose`` names, given the requests in flight at each."""
    replicas = {replica.name: replica for replica in fleet}
    in_flight = dict.fromkeys(replicas, 0)

    async def ask(adapter: str) -> None:
        name = choose(adapter, in_flight)
        in_flight[name] += 1
        await _there_and_back(replicas[name].answer(adapter))
        in_flight[name] -= 1

    answered, seconds = await closed_loop(ask, trace)
    return figures(answered, seconds, [replica.tally for replica in replicas.values()])


async def _multiplexed(trace: Sequence[str]) -> Figures:
    """Serve's rules: who holds the model as last heard, else who holds fewest; of these the least busy."""
    replicas = [Lookalike(name) for name in _NAMES]
    heard = {replica.name: replica.models() for replica in replicas}
    unmatched: set[str] = set()
    rng = random.Random(0)

    async def listen() -> None:
        while True:
            await asyncio.sleep(_PUSH_S - _BROADCAST_S)
            told = {replica.name: replica.models() for replica in replicas}
            await asyncio.sleep(_BROADCAST_S)
            heard.update(told)

    async def candidates(adapter: str) -> list[Lookalike]:
        holders = [replica for replica in replicas if adapter in heard[replica.name]]
        if holders:
            unmatched.discard(adapter)
            return holders
        if adapter in unmatched:  # somebody else has just been sent where fewest are
            await asyncio.sleep(_BACKOFF_S)
        unmatched.add(adapter)
        fewest = min(len(models) for models in heard.values())
        return [replica for replica in replicas if len(heard[replica.name]) == fewest]

    async def ask(adapter: str) -> None:
        group = await candidates(adapter)
        replica = min(rng.sample(group, len(group)), key=lambda one: one.in_flight)
        replica.in_flight += 1
        await _there_and_back(replica.answer(adapter))
        replica.in_flight -= 1

    listener = asyncio.create_task(listen())
    answered, seconds = await closed_loop(ask, trace)
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    return figures(answered, seconds, [replica.tally for replica in replicas])


async def _there_and_back(answer: Awaitable[None]) -> None:
    await asyncio.sleep(_HOP_S)
    await answer
    await asyncio.sleep(_HOP_S)


_CONTENDERS = {
    "multiplexed": _multiplexed,
    "consistent_hash": _consistent_hash,
    "rendezvous": _bounded_rendezvous,
    "lru": _lru,
    "ours": _ours,
}
