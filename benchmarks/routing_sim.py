"""Where should rows go? Our routing against the peers' rules, on the same rows, in virtual time.

    python -m benchmarks.routing_sim [--replicas 20] [--adapters 2000] [--rows 40000] [--traces NAME ...]
                                     [--json PATH] [--png PATH] [--seed 0]

Ours are the product's own ``Fleet``, ``Homes``, ``Demand`` and ``choose``, three routers that know of each other and of
the replicas what replies tell them. The peers' rules see the truth: each queue and each cache as it is just now.

- ``ray pow-2``: of two random replicas the less busy one
- ``ray multiplexed``: who holds the model, else who has room, of two of these the less busy one
- ``consistent hash``: a ring with a hundred virtual nodes for each replica
- ``gaie``: 1.0 held, 0.8 room, 0.6 coming, else 0, and the queue's length from 0 to 1; the highest sum
- ``dynamo hrw``: rendezvous hashing, slots in proportion to an adapter's part of the requests, the least busy of these

Each rule runs twice: with caches that evict the least recently used, as all of the peers' do, and ``/routing`` with our
eviction, where only the routing differs. A row hits when its adapter is there as it comes. Loads of one replica follow
each other. ``moved``: homes that changed for each replica that came or went, in fair shares.

A rule that leaves one replica more than it can do looks better in hits than it serves: rows that wait for half a minute
in its queue keep their adapters there, and join loads. See ``p99`` beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.harness import Result, write_json
from benchmarks.routing_simulation.chart import draw
from benchmarks.routing_simulation.routers import PEERS
from benchmarks.routing_simulation.setting import Setting
from benchmarks.routing_simulation.traces import TRACES
from benchmarks.routing_simulation.world import Figures, simulate

_UNITS = {"p50_s": "s", "p99_s": "s"}
_PANELS = {"hit_rate": "hit rate", "loads_per_1000": "loads per 1,000 rows", "balance": "busiest replica over mean"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=Setting.replicas)
    parser.add_argument("--adapters", type=int, default=Setting.adapters)
    parser.add_argument("--rows", type=int, default=Setting.rows)
    parser.add_argument("--traces", nargs="*", choices=[*TRACES], default=[*TRACES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    setting = Setting(args.replicas, args.adapters, rows=args.rows)
    figures = {name: compare(name, setting, args.seed) for name in args.traces}
    if args.json:
        write_json(args.json, "routing_sim", results(figures))
    if args.png:
        plot(args.png, figures)


def compare(name: str, setting: Setting, seed: int) -> dict[str, Figures]:
    """All rules on one trace, printed as they come."""
    trace = TRACES[name](setting, np.random.default_rng(seed))
    print(f"{name:24}  hits  loads/1000  busiest  p50 ms   p99 ms  moved")
    found = {}
    for rule, lru in [("ours", False), *((peer, True) for peer in PEERS), *((peer, False) for peer in PEERS)]:
        label = rule if lru or rule == "ours" else f"{rule}/routing"
        one = found[label] = simulate(rule, trace, setting, lru=lru)
        moved = "     -" if one.moved is None else f"{one.moved:6.2f}"
        print(
            f"{label:23} {one.hit_rate:.4f}  {one.loads_per_1000:9.1f}  {one.balance:7.3f}  {1e3 * one.p50_s:6.0f}  "
            f"{1e3 * one.p99_s:7.0f} {moved}",
            flush=True,
        )
    return found


def results(figures: Mapping[str, Mapping[str, Figures]]) -> list[Result]:
    """One figure each; they are the same in every run with the same seed."""
    return [
        Result(f"{trace}/{rule}/{key}", float(value), _UNITS.get(key, ""), 0.0)
        for trace, rules in figures.items()
        for rule, one in rules.items()
        for key, value in asdict(one).items()
        if value is not None
    ]


def plot(path: Path, figures: Mapping[str, Mapping[str, Figures]]) -> None:
    """Bars for ours and the peers as they are; waits by the decimal logarithm of milliseconds."""
    rules = ["ours", *PEERS]

    def values(key: str) -> Mapping[str, Sequence[float]]:
        return {trace: [float(asdict(found[rule])[key]) for rule in rules] for trace, found in figures.items()}

    panels = {title: values(key) for key, title in _PANELS.items()}
    waits = {trace: [float(np.log10(1e3 * wait)) for wait in found] for trace, found in values("p99_s").items()}
    draw(path, rules, {**panels, "p99 from coming to answered: log10 of ms": waits})


if __name__ == "__main__":
    main()
