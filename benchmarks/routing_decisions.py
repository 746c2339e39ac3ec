"""What does it cost to decide where a row goes? Microseconds a row, by the number of replicas.

    python -m benchmarks.routing_decisions [--json PATH] [--rounds 5]

100 adapters for each replica, true Zipf(1.0), 40 held by each; rows come at 70 % of what the replicas can do and are
answered a tenth of a second later. The whole of what a router does about it is timed: noting the demand, choosing, and
keeping the fleet's books, replies included. Before that as many rows go by untimed.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np

from adapter_router.config import RoutingConfig
from adapter_router.errors import InternalError
from adapter_router.routing.affinity import Wanted, choose
from adapter_router.routing.demand import Demand
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.types import ReplicaLoad, ResidencyChange, ShardReply
from benchmarks.harness import Result, summary, write_json

_ADAPTERS = 100  # for each replica
_HELD = 40
_ROWS_S = 130.0  # of one replica
_ANSWERED_S = 0.1
_ERROR = InternalError("")


class _Rows:
    """Rows go and come back; replicas hold those adapters that were asked for last."""

    def __init__(self, replicas: int) -> None:
        self._fleet, self._demand, self._config = Fleet(), Demand(), RoutingConfig()
        came, _ = self._fleet.sync(Member(f"replica {n}", f"rank {n}") for n in range(replicas))
        for state in came:
            self._fleet.admit(state)
        self._held: dict[str, OrderedDict[str, None]] = {state.replica: OrderedDict() for state in came}
        self._between_s = 1 / (_ROWS_S * replicas)
        self._under_way: deque[tuple[ReplicaState, str, str | None]] = deque()
        self._now = 0.0

    def go_by(self, adapters: list[str]) -> float:
        """Seconds of ours."""
        late = int(_ANSWERED_S / self._between_s)
        start = time.perf_counter()
        for adapter in adapters:
            self._now += self._between_s
            self._demand.note(adapter, 1.0, self._now)
            wanted = Wanted(adapter, 1, 1000, self._demand.rate(adapter, self._now))
            state = choose(wanted, self._fleet, self._config)
            assert state is not None
            cold = None if state.holds(adapter) else adapter
            self._fleet.assigned(state, 1)
            self._fleet.sent(state, 1, cold)
            self._under_way.append((state, adapter, cold))
            if len(self._under_way) > late:
                self._answer(*self._under_way.popleft())
        return time.perf_counter() - start

    def _answer(self, state: ReplicaState, adapter: str, cold: str | None) -> None:
        held = self._held[state.replica]
        gone = frozenset([held.popitem(last=False)[0]]) if adapter not in held and len(held) == _HELD else frozenset()
        held[adapter] = None
        held.move_to_end(adapter)
        news = ResidencyChange(state.revision + 1, frozenset([adapter]), gone)
        load = ReplicaLoad(rows=state.in_flight - 1)
        self._fleet.observe(ShardReply(state.replica, [_ERROR], news, load), 0.005 if cold is None else None)
        self._fleet.returned(state, 1, cold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = [measure(replicas, args.rounds) for replicas in (10, 100, 1000)]
    if args.json:
        write_json(args.json, "routing_decisions", results)


def measure(replicas: int, rounds: int) -> Result:
    """Of each round, the mean over its rows."""
    adapters, rows = replicas * _ADAPTERS, max(20_000, 100 * replicas)
    shares = 1 / np.arange(1, adapters + 1)
    rng = np.random.default_rng(0)
    drawn = rng.choice(adapters, (rounds + 1, rows), p=shares / shares.sum())
    names = [f"sha256:{number:064x}" for number in range(adapters)]
    fleet = _Rows(replicas)
    seconds = [fleet.go_by([names[index] for index in part]) for part in drawn]
    result = summary(f"{replicas} replicas, {adapters} adapters", [1e6 * one / rows for one in seconds[1:]], "us")
    print(f"{result.name}: {result.value:.1f} ± {result.spread:.1f} us a row", flush=True)
    return result


if __name__ == "__main__":
    main()
