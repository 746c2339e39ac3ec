"""What share of requests costs no load, where the adapters do not all fit?

    python -m benchmarks.cache [--json PATH] [--seeds 10]

24 adapters of true Zipf(1.0) popularity, two replicas with four slots each, 50 ms to load, 5 ms to run, eight callers
in a closed loop, 600 requests from empty caches. On real Ray Serve, taking turns:

- ``multiplexed``: Ray's ``@serve.multiplexed``
- ``consistent_hash``: Ray's ConsistentHashRouter by ``session_id``, with the LRU cache of ``@serve.multiplexed``
- ``rendezvous``: bounded rendezvous hashing, with the same cache
- ``lru``: Ray's ConsistentHashRouter before replicas that load as ours do, but evict the least recently used
- ``ours``: dispatcher, affinity and eviction as they serve

Zipf 0.9 and 1.5, a hot set that moves and a scan run in virtual time, where Zipf 1.0 is run once more as a check.
``hit_rate`` is 1 - loads / requests for everybody, so who waits for a load that somebody else has begun counts as a
hit; ``at_once`` is the share of requests that were answered sooner than a load takes.

What limits it. The eight most popular adapters get 0.720 of the requests, but they cannot stay: an adapter must take a
slot to run, so each replica has a slot that the others pass through, and six are left for the hottest.
``known_popularity`` is what one cache of all eight slots finds if it knows how often each adapter is going to be asked
for, from empty and one request after the other; ``clairvoyant`` also knows when, and in this order nobody needs fewer
loads. What brings us near it is that requests join loads in flight, which needs a router that sends them there: when
rows of a cold adapter could go to either replica our rate was 3 to 7 points lower in virtual time. To keep all cold
adapters on one replica, the one whose slots are worth least, was tried there, too: 2 points more, but 20 % less
throughput and 1.5 times the p99, since loads wait for each other. So a new copy goes where it costs least time.

Real figures suffer where others use the machine: with a load of 13 on two cores ours was 0.706 instead of 0.725.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.caching import on_ray, virtual
from benchmarks.caching.callers import Figures
from benchmarks.caching.tally import REPLICAS, SLOTS
from benchmarks.caching.traces import (
    Workload,
    clairvoyant_loads,
    is_one_off,
    known_popularity_loads,
    popularity,
    scan,
    shifting,
    zipf,
)
from benchmarks.harness import Result, summary, write_json
from deployments.local import local_ray

_CONTENDERS = ("multiplexed", "consistent_hash", "rendezvous", "lru", "ours")
_UNITS = {"p50_ms": "ms", "p99_ms": "ms", "requests_per_s": "1/s"}

Measure = Callable[[str, Sequence[str]], Figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    results = []
    with local_ray(8124):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        handles = on_ray.deploy()
        results += compare(zipf(1.0), args.seeds, lambda name, trace: on_ray.measure(name, handles[name], trace))
    for workload in (zipf(1.0), zipf(0.9), zipf(1.5), shifting(), scan()):
        results += compare(workload, args.seeds, virtual.measure, prefix="virtual/")
    if args.json:
        write_json(args.json, "cache", results)


def compare(workload: Workload, seeds: int, measure: Measure, prefix: str = "") -> list[Result]:
    """All contenders on the same requests, a seed after the other, who goes first in turns."""
    name = f"{prefix}{workload.name}"
    figures: dict[str, list[Figures]] = {contender: [] for contender in _CONTENDERS}
    for seed in range(seeds):
        trace = workload.trace(seed)
        first = seed % len(_CONTENDERS)
        for contender in (*_CONTENDERS[first:], *_CONTENDERS[:first]):
            figures[contender].append(measure(contender, trace))
    results = [result for contender in _CONTENDERS for result in _results(name, contender, figures[contender])]
    results += _ratios(name, figures)
    results += _bounds(name, workload, seeds)
    _show(name, {result.name: result for result in results})
    return results


def _results(name: str, contender: str, figures: Sequence[Figures]) -> list[Result]:
    """Means over the seeds, which differ by more than the contenders do; ours have the shortest names."""
    where = name if contender == "ours" else f"{name}/{contender}"
    columns = {key: [asdict(one)[key] for one in figures] for key in asdict(figures[0])}
    return [_mean(f"{where}/{key}", values, _UNITS.get(key, "")) for key, values in columns.items()]


def _ratios(name: str, figures: Mapping[str, Sequence[Figures]]) -> list[Result]:
    ours = figures["ours"]
    return [
        summary(f"{name}/ours_over_{peer}", [o.hit_rate / p.hit_rate for o, p in zip(ours, peers, strict=True)], "x")
        for peer, peers in figures.items()
        if peer != "ours"
    ]


def _bounds(name: str, workload: Workload, seeds: int) -> list[Result]:
    def rate(loads: Sequence[str], trace: Sequence[str]) -> float:
        return 1 - _repeated(loads) / _repeated(trace)

    traces = [workload.trace(seed) for seed in range(seeds)]
    slots = REPLICAS * SLOTS
    bounds = [_mean(f"{name}/bound/clairvoyant", [rate(clairvoyant_loads(t, slots), t) for t in traces])]
    if workload.exponent is not None:
        known = [rate(known_popularity_loads(trace, slots), trace) for trace in traces]
        bounds.append(_mean(f"{name}/bound/known_popularity", known))
        bounds.append(Result(f"{name}/bound/static", sum(popularity(workload.exponent)[:slots]), "", 0.0))
    return bounds


def _repeated(trace: Sequence[str]) -> int:
    return sum(not is_one_off(adapter) for adapter in trace)


def _mean(name: str, values: Sequence[float], unit: str = "") -> Result:
    """``spread`` is the standard deviation from seed to seed."""
    return Result(name, statistics.mean(values), unit, statistics.stdev(values) if len(values) > 1 else 0.0)


def _show(name: str, results: Mapping[str, Result]) -> None:
    print(f"{name}\n{'':16} hit rate     at once  loads/1000   p50 ms   p99 ms  requests/s  busiest")
    for contender in _CONTENDERS:
        where = name if contender == "ours" else f"{name}/{contender}"
        hit, at_once, loads, p50, p99, speed, balance = (
            results[f"{where}/{key}"] for key in Figures.__dataclass_fields__
        )
        print(
            f"{contender:16} {hit.value:.3f} ± {hit.spread:.3f}  {at_once.value:7.3f}  {loads.value:10.0f}  "
            f"{p50.value:7.1f}  {p99.value:7.1f}  {speed.value:10.0f}    {balance.value:.3f}"
        )
    bounds = {key.rsplit("/", 1)[1]: result for key, result in results.items() if "/bound/" in key}
    print("  ".join(f"{key} {bound.value:.3f}" for key, bound in bounds.items()), flush=True)


if __name__ == "__main__":
    main()
