"""How much does each way to serve adapters on Ray get through before its answers come late?

    python -m benchmarks.serving [--json PATH] [--adapters 8 64 200] [--limit-ms 250] [--seconds 8] [--rounds 3]

The demo's MiniLM and adapters of ranks 4 to 32 that PEFT wrote, each with a head of its own, all of one size: PEFT can
hold no others on one base. Two replicas with one thread each, and requests in open loop, Poisson or in bursts, adapters
by true Zipf(1.0):

- ``ours``: the application of ``deployments/app.py``
- ``multiplexed+set_adapter``: Ray's ``@serve.multiplexed``, PEFT's ``set_adapter``; a request has one adapter
- ``batch+adapter_names``: Ray's ``@serve.batch``, PEFT's ``adapter_names``; for the 8 adapters that are all loaded

All have room for 32 adapters a replica, and are asked by this one process on one event loop, through Serve's handles;
that, Ray's daemons and our router share the same two cores. Goodput is the highest rate whose 99th percentile is within
the limit: rates are searched in turns, and what was found is measured again, in turns. Latencies count from when a
request was due. Before, every answer of each contender is held against PEFT's with one adapter alone.

``overhead/32_rows_a_call`` is our application's throughput with one replica, over that of its engine alone in this
process, on the same calls of 32 rows and as many threads; the stages under it say where the time of one call goes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.harness import Result, summary, write_json
from benchmarks.serving_peers import adapters, overhead, systems
from benchmarks.serving_peers.arrivals import PATTERNS, TEXTS, Arrival, Pattern, draw
from benchmarks.serving_peers.open_loop import Outcome, offer
from benchmarks.serving_peers.search import Search
from benchmarks.serving_peers.systems import BATCHED, MULTIPLEXED, OURS, System
from deployments.local import local_ray

_FIRST_RATE = 40.0
_LOWER = 0.93  # what is tried when a rate that was found does not hold
_TRIES = 4
_TOLERANCE = 1e-4
_CHECKED = range(0, len(TEXTS), 4)  # texts that each adapter is asked with beforehand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--adapters", type=int, nargs="*", default=[8, 64, 200])
    parser.add_argument("--patterns", choices=PATTERNS, nargs="+", default=PATTERNS)
    parser.add_argument("--contenders", nargs="+", default=(OURS, MULTIPLEXED, BATCHED))
    parser.add_argument("--rows", type=int, default=1, help="of one request")
    parser.add_argument("--limit-ms", type=float, default=250.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overhead-rounds", type=int, default=7, help="0 leaves it out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="serving-") as name, local_ray(8125):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        folder = Path(name)
        directories = adapters.write(folder / "adapters", max([8, *args.adapters]))
        if args.overhead_rounds:
            results += overhead.measure(_first(directories, 8), folder, args.overhead_rounds)
        alone = adapters.solo_logits(directories, [TEXTS[text] for text in _CHECKED]) if args.adapters else {}
        for count in args.adapters:
            running = systems.start(_first(directories, count), folder, tuple(args.contenders))
            contest = Contest(running, count, args.rows, args.limit_ms / 1e3, args.seconds)
            results += contest.check(alone)
            for pattern in args.patterns:
                results += contest.run(pattern, args.rounds)
            systems.stop(running)
    if args.json:
        write_json(args.json, "serving", results)


class Contest:
    """Systems that serve the same ``count`` adapters, taking turns."""

    def __init__(self, running: Sequence[System], count: int, rows: int, limit_s: float, seconds: float) -> None:
        self._systems = running
        self._count = count
        self._rows = rows
        self._limit_s = limit_s
        self._seconds = seconds
        self._seed = 0

    def check(self, alone: Mapping[str, NDArray[np.float32]]) -> list[Result]:
        """Ask for every adapter with some texts, many at once, and count the answers that are not PEFT's."""
        asked = [Arrival(0.0, adapters.name_of(i), (text,)) for i in range(self._count) for text in _CHECKED]
        random.Random(0).shuffle(asked)

        async def answers(system: System) -> list[NDArray[np.float32]]:
            turns = asyncio.Semaphore(16)

            async def one(arrival: Arrival) -> NDArray[np.float32]:
                async with turns:
                    return await system.logits(arrival)

            return await asyncio.gather(*(one(arrival) for arrival in asked))

        results = []
        for system in self._systems:
            given = asyncio.run(answers(system))
            off = [
                float(np.abs(logits[0] - alone[arrival.adapter][_CHECKED.index(arrival.texts[0])]).max())
                for arrival, logits in zip(asked, given, strict=True)
            ]
            wrong = sum(not one <= _TOLERANCE for one in off)
            print(
                f"{self._count:4} {system.name:24} wrong answers {wrong} of {len(off)}, off by {max(off):.1e} at most"
            )
            results.append(Result(f"{self._count}/{system.name}/wrong_answers", wrong / len(off), "", 0.0))
        return results

    def run(self, pattern: Pattern, rounds: int) -> list[Result]:
        """Goodput and latencies of each, and ours over each peer's."""
        rates = self._search(pattern)
        measured: dict[str, list[Outcome]] = {}
        for _ in range(_TRIES):
            again = {s: rates[s.name] for s in self._systems if s.name not in measured}
            outcomes: dict[str, list[Outcome]] = {system.name: [] for system in again}
            for _ in range(rounds):
                for system, rate in again.items():
                    outcomes[system.name].append(self._offer(system, pattern, rate))
            for name, found in outcomes.items():
                if statistics.median(outcome.quantile(0.99) for outcome in found) <= self._limit_s:
                    measured[name] = found
                else:
                    rates[name] *= _LOWER
        return self._report(pattern, {name: measured.get(name, []) for name in rates})

    def _search(self, pattern: Pattern) -> dict[str, float]:
        searches = {system: Search(_FIRST_RATE) for system in self._systems}
        while not all(search.done for search in searches.values()):
            for system, search in searches.items():
                if not search.done:
                    # Whoever fails may try again at once: one hiccup of the machine would halve a goodput.
                    tries = (self._offer(system, pattern, search.rate) for _ in range(2))
                    search.note(any(outcome.quantile(0.99) <= self._limit_s for outcome in tries))
        return {system.name: search.best or 0.0 for system, search in searches.items()}

    def _offer(self, system: System, pattern: Pattern, rate: float) -> Outcome:
        """The seed changes with every offer: nobody is measured twice on the same arrivals."""
        self._seed += 1
        arrivals = draw(pattern, rate, self._seconds, self._count, self._rows, self._seed)
        outcome = asyncio.run(offer(system.ask, arrivals, self._seconds, self._limit_s))
        print(
            f"{self._count:4} {pattern:8} {system.name:24} {rate:7.1f}/s  p50 {1e3 * outcome.quantile(0.5):6.0f}  "
            f"p99 {1e3 * outcome.quantile(0.99):6.0f} ms  unanswered {outcome.unanswered}  "
            f"generator late by {1e3 * outcome.lag_s:.0f} ms",
            flush=True,
        )
        return outcome

    def _report(self, pattern: Pattern, measured: Mapping[str, Sequence[Outcome]]) -> list[Result]:
        results = []
        goodput = {}
        for name, outcomes in measured.items():
            where = f"{self._count}/{pattern}/{name}"
            rows = [self._rows * outcome.goodput(self._limit_s) for outcome in outcomes] or [0.0]
            goodput[name] = statistics.median(rows)
            results.append(summary(f"{where}/goodput", rows, "rows/s"))
            for quantile in (0.5, 0.95, 0.99):
                values = [1e3 * outcome.quantile(quantile) for outcome in outcomes]
                results += [summary(f"{where}/p{100 * quantile:.0f}", values, "ms")] if values else []
        for name in goodput.keys() - {OURS}:
            if OURS in goodput and goodput[name]:
                results.append(
                    Result(f"{self._count}/{pattern}/ours_over_{name}", goodput[OURS] / goodput[name], "x", 0.0)
                )
        for result in results:
            print(f"  {result.name:56} {result.value:8.1f} {result.unit} ± {result.spread:.1f}", flush=True)
        return results


def _first(directories: Mapping[str, Path], count: int) -> dict[str, Path]:
    return dict(list(directories.items())[:count])


if __name__ == "__main__":
    main()
