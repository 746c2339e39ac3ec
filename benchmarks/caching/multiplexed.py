"""Ray's ``@serve.multiplexed``, and what behaves like it where there is no Ray. Without torch, so it starts sooner."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from ray import serve

from benchmarks.caching.tally import LOAD_S, RUN_S, SLOTS, Tally


class Multiplexed:
    """``@serve.multiplexed`` as Ray documents it; with another router it is also that one's LRU cache."""

    def __init__(self) -> None:
        self._tally = Tally()

    @serve.multiplexed(max_num_models_per_replica=SLOTS)  # type: ignore[untyped-decorator]  # Ray ships no usable types
    async def model(self, adapter: str) -> str:
        self._tally.loads[adapter] += 1
        await asyncio.sleep(LOAD_S)
        return adapter

    async def answer(self, adapter: str) -> None:
        """One request."""
        self._tally.rows += 1
        await self.model(adapter)
        await asyncio.sleep(RUN_S)

    async def tally(self) -> Tally:
        """What was counted since the last ``forget``."""
        return self._tally

    async def forget(self) -> None:
        """Unload everything and count from nothing."""
        cache = getattr(self, "__serve_multiplex_wrapper", None)
        if cache is not None:
            cache._model_load_tasks.clear()  # it keeps those of requests that found another's load done
            cache._push_multiplexed_replica_info = True  # else the routers are told with the next load only
        while cache is not None and cache.models:
            await cache.unload_model_lru()
        self._tally = Tally()


class Lookalike:
    """What ``@serve.multiplexed`` does, for virtual time: one load at a time, the least recently used goes first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tally = Tally()
        self.in_flight = 0
        self._models: OrderedDict[str, None] = OrderedDict()
        self._coming: set[str] = set()
        self._lock = asyncio.Lock()

    def models(self) -> frozenset[str]:
        """What it says it holds: what it is loading, too."""
        return frozenset({*self._models, *self._coming})

    async def answer(self, adapter: str) -> None:
        """One request for one adapter."""
        self.tally.rows += 1
        if adapter in self._models:
            self._models.move_to_end(adapter)
        else:
            await self._bring_in(adapter)
        await asyncio.sleep(RUN_S)

    async def _bring_in(self, adapter: str) -> None:
        self._coming.add(adapter)
        async with self._lock:
            if adapter in self._models:
                return
            if len(self._models) == SLOTS:
                self._models.popitem(last=False)
            self.tally.loads[adapter] += 1
            await asyncio.sleep(LOAD_S)
            self._models[adapter] = None
            self._coming.discard(adapter)
