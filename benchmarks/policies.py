"""Which adapters should stay? Hit rates of eviction policies on the same requests, without a model or a server.

    python -m benchmarks.policies [--json PATH] [--seeds 10]

Adapters of one size, drawn by true Zipf; caches that hold few of them. Each adapter has one home, chosen by rendezvous
hashing, so that what differs is the policy. Every adapter must be in its cache while its rows run: one that is not
drives another out, be it worth less. A row hits when its adapter is there as its batch arrives. ``ideal`` is the share
of requests for as many most wanted adapters as all caches hold together: no placement that stays as it is gets more,
but what shifts is beyond it.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from adapter_router.engine.eviction import Popularity
from adapter_router.engine.slots import SlotTable
from benchmarks.harness import Result, summary, write_json


class Cache(Protocol):
    """Room for some adapters of one size."""

    def request(self, adapter: str, rows: int) -> bool:
        """``rows`` of one batch ask for ``adapter``: whether it was there. It is there afterwards."""


@dataclass(frozen=True)
class Workload:
    """``zipf``: its exponent. ``shift``: requests after which all change their popularity. ``batch``: rows together.

    ``scan``: requests, for each that counts, for adapters that are asked for once and never again.
    """

    zipf: float = 1.0
    adapters: int = 24
    requests: int = 4000
    shift: int = 0
    scan: float = 0.0
    batch: int = 1

    def shares(self) -> np.ndarray:
        """Probability of each adapter, most wanted first."""
        weights = 1 / np.arange(1, self.adapters + 1) ** self.zipf
        shares: np.ndarray = weights / weights.sum()
        return shares

    def batches(self, rng: np.random.Generator) -> Iterator[Counter[str]]:
        """Rows by adapter; those of a scan are named ``scan…``."""
        order, scanned = rng.permutation(self.adapters), 0
        for start in range(0, self.requests, self.batch):
            if self.shift and start and start % self.shift < self.batch:
                order = rng.permutation(self.adapters)
            drawn = order[rng.choice(self.adapters, self.batch, p=self.shares())]
            rows = Counter(f"adapter {index}" for index in drawn)
            passing = rng.poisson(self.scan * self.batch)
            rows.update(f"scan {number}" for number in range(scanned, scanned + passing))
            scanned += passing
            yield rows


SMALL: dict[str, Workload] = {
    "zipf 1.0": Workload(),
    "zipf 0.9": Workload(zipf=0.9),
    "zipf 1.5": Workload(zipf=1.5),
    "first 600": Workload(requests=600),
    "shifts every 1000": Workload(shift=1000),
    "shifts every 250": Workload(shift=250),
    "scan": Workload(scan=0.3),
    "batches of 16": Workload(batch=16),
}
"""For 2 caches of 4."""

LARGE: dict[str, Workload] = {
    "2000 adapters": Workload(adapters=2000, requests=30_000),
    "2000, shifts": Workload(adapters=2000, requests=30_000, shift=7500),
    "2000, scan": Workload(adapters=2000, requests=30_000, scan=0.3),
}
"""For 2 caches of 64."""


class Lru:
    """The least recently used goes."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._order: OrderedDict[str, None] = OrderedDict()

    def request(self, adapter: str, rows: int) -> bool:  # noqa: ARG002
        there = adapter in self._order
        self._order[adapter] = None
        self._order.move_to_end(adapter)
        if len(self._order) > self._slots:
            self._order.popitem(last=False)
        return there


class Lfu:
    """The least frequently used goes; all counts are halved now and then, and kept of what is not there."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._there: set[str] = set()
        self._since = 0

    def request(self, adapter: str, rows: int) -> bool:
        self._counts[adapter] += rows
        self._since += rows
        if self._since > 16 * self._slots:
            self._since = 0
            self._counts = defaultdict(float, {name: count / 2 for name, count in self._counts.items() if count > 0.1})
        there = adapter in self._there
        if not there and len(self._there) >= self._slots:
            self._there.remove(min(self._there, key=self._counts.__getitem__))
        self._there.add(adapter)
        return there


class Gdsf:
    """Frequency since it came, plus the clock at its last use; the clock is what the last that went had (1998)."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._clock = 0.0
        self._counts: Counter[str] = Counter()
        self._priorities: dict[str, float] = {}

    def request(self, adapter: str, rows: int) -> bool:
        there = adapter in self._priorities
        if not there and len(self._priorities) >= self._slots:
            victim = min(self._priorities, key=self._priorities.__getitem__)
            self._clock = self._priorities.pop(victim)
            del self._counts[victim]
        self._counts[adapter] += rows
        self._priorities[adapter] = self._clock + self._counts[adapter]
        return there


class WTinyLfu:
    """A small window by recency; what leaves it stays if it is wanted more than what it would drive out (2017)."""

    def __init__(self, slots: int) -> None:
        self._window_slots = max(1, slots // 100)
        self._main_slots = slots - self._window_slots
        self._window: OrderedDict[str, None] = OrderedDict()
        self._main: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._sample = 10 * slots

    def request(self, adapter: str, rows: int) -> bool:
        self._counts[adapter] += rows
        if self._counts.total() > self._sample:
            self._counts = Counter({name: count // 2 for name, count in self._counts.items() if count > 1})
        for part in (self._window, self._main):
            if adapter in part:
                part.move_to_end(adapter)
                return True
        self._window[adapter] = None
        if len(self._window) > self._window_slots:
            self._admit(self._window.popitem(last=False)[0])
        return False

    def _admit(self, candidate: str) -> None:
        if len(self._main) >= self._main_slots:
            victim = next(iter(self._main))
            if self._counts[candidate] <= self._counts[victim]:
                return
            del self._main[victim]
        self._main[candidate] = None


class Ours:
    """What the engine does."""

    def __init__(self, slots: int) -> None:
        self._popularity = Popularity()
        self._table = SlotTable(slots, self._popularity.worth)

    def request(self, adapter: str, rows: int) -> bool:
        self._popularity.used(adapter, rows)
        if adapter in self._table:
            self._table.lease(adapter)
            self._table.release(adapter)
            return True
        for victim in self._table.room_for(1) or ():
            self._table.remove(victim)
        self._table.add(adapter, 1)
        self._popularity.sized(len(self._table))
        return False


POLICIES: dict[str, Callable[[int], Cache]] = {
    "lru": Lru,
    "lfu": Lfu,
    "gdsf": Gdsf,
    "w-tinylfu": WTinyLfu,
    "ours": Ours,
}


def hit_rate(policy: Callable[[int], Cache], workload: Workload, slots: int, caches: int, seed: int) -> float:
    """Of the rows that are no scan's."""
    places = [policy(slots) for _ in range(caches)]
    hits: Counter[bool] = Counter()
    for batch in workload.batches(np.random.default_rng(seed)):
        for adapter, rows in batch.items():
            there = places[home(adapter, caches, seed)].request(adapter, rows)
            if not adapter.startswith("scan"):
                hits[there] += rows
    return hits[True] / hits.total()


def home(adapter: str, caches: int, seed: int = 0) -> int:
    """Rendezvous hashing: each adapter has one cache, whatever the others do."""
    return max(range(caches), key=lambda cache: hashlib.blake2b(f"{seed} {cache} {adapter}".encode()).digest())


def ideal(workload: Workload, held: int) -> float:
    """Share of the ``held`` most wanted."""
    return float(workload.shares()[:held].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    results = [*measure(SMALL, 4, 2, args.seeds), *measure(LARGE, 64, 2, max(1, args.seeds // 5))]
    if args.json:
        write_json(args.json, "policies", results)


def measure(workloads: Mapping[str, Workload], slots: int, caches: int, seeds: int) -> list[Result]:
    """Every policy on every workload, each policy on the same requests."""
    print(f"{f'{caches} caches of {slots}':18}", *(f"{name:>10}" for name in (*POLICIES, "ideal")))
    results = []
    for name, workload in workloads.items():
        rates: dict[str, Sequence[float]] = {
            policy: [hit_rate(make, workload, slots, caches, seed) for seed in range(seeds)]
            for policy, make in POLICIES.items()
        }
        rates["ideal"] = [ideal(workload, slots * caches)]
        print(f"{name:18}", *(f"{statistics.mean(found):10.3f}" for found in rates.values()), flush=True)
        results += [summary(f"{name}/{policy}", list(found), "hit rate") for policy, found in rates.items()]
    return results


if __name__ == "__main__":
    main()
