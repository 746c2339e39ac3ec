"""Five times more than the replicas can do, for a minute: what is still answered in time, and how soon it is over.

    python -m benchmarks.overload [--json PATH] [--seconds 60] [--times 5] [--timeout 1.5] [--rows 8]

The demo's MiniLM behind one replica with one thread, so that a core is left for router, Ray and the callers, which are
this process. First a closed loop finds the peak, then calls of a few rows come in open loop, as a Poisson process: at
half the peak, at ``--times`` the peak for ``--seconds``, and at half again. Each row names a timeout; four tenants ask.

- ``goodput_over_peak``: rows answered within their timeout during the overload, a second, over the peak's
- ``admitted_p99_over_timeout``: of the rows that were not refused at once; those that ran out of time count as they are
- ``router_growth``: of the router's resident memory, by a line through the overload without its first ten seconds
- ``retry_after_over_drain``: what the refusals of the last two seconds advised, over the time it then took until
  everything that had been taken was answered
- ``recovery``: from the end of the overload until the 99th percentile of all that comes later is within 1.5 times that
  of before; ``generator_late`` says how late calls were made, ``generator_cpu`` what this process used of its core
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import transformers

from adapter_router.errors import DeadlineExceeded, Overloaded
from adapter_router.types import RowResult
from benchmarks.harness import Result, write_json
from benchmarks.serving_peers import adapters, systems
from benchmarks.serving_peers.callers import ADAPTERS, Call, Callers
from deployments.local import deploy, local_ray

_NAME = "overload"
_PEAK_S = 10.0
_CALM_S = 15.0
_CALM = 0.5  # of the peak
_LIKE_BEFORE = 1.5
_SETTLING_S = 10.0
_LAST_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=5.0)
    parser.add_argument("--timeout", type=float, default=1.5)
    parser.add_argument("--rows", type=int, default=8, help="of one call")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="overload-") as name, local_ray(8126):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        folder = Path(name)
        directories = adapters.write(folder / "adapters", ADAPTERS)
        handle = deploy(systems.ours(directories, folder / "store", replicas=1), _NAME, f"/{_NAME}")
        callers = Callers(handle, args.timeout, args.rows)
        results = asyncio.run(measure(callers, args.seconds, args.times))
    for result in results:
        print(f"  {result.name:40} {result.value:9.3f} {result.unit}", flush=True)
    if args.json:
        write_json(args.json, "overload", results)


async def measure(callers: Callers, seconds: float, times: float) -> list[Result]:
    """All phases, one after the other without a pause."""
    await callers.peak(_PEAK_S / 2)
    peak = await callers.peak(_PEAK_S)
    before = await callers.offer(_CALM * peak, _CALM_S)
    callers.late.clear()
    router = _router()
    used, start = time.process_time(), time.monotonic()
    watching = asyncio.create_task(_watch(router))
    # Those who come afterwards do not wait for the last answers of the overload.
    overloading = asyncio.create_task(callers.offer(times * peak, seconds))
    await asyncio.sleep(seconds)
    end = asyncio.get_running_loop().time()
    cpu = (time.process_time() - used) / (time.monotonic() - start)
    late = float(np.quantile(callers.late, 0.99))
    watching.cancel()
    after = await callers.offer(_CALM * peak, _CALM_S)
    overload = await overloading
    memory = (await asyncio.gather(watching, return_exceptions=True))[0]
    assert isinstance(memory, list), memory
    return [
        Result("peak", peak, "rows/s", 0.0),
        Result("offered", times * peak, "rows/s", 0.0),
        *_during(overload, peak, seconds, callers.timeout_s),
        *_refusals(overload, end),
        Result("router_growth", _slope(memory), "MiB/min", 0.0),
        Result("router_memory", memory[-1][1] if memory else 0.0, "MiB", 0.0),
        Result("before/p99", 1e3 * _p99(before), "ms", 0.0),
        Result("after/p99", 1e3 * _p99(after), "ms", 0.0),
        Result("recovery", _recovery(before, after, end), "s", 0.0),
        Result("generator_late/p99", 1e3 * late, "ms", 0.0),
        Result("generator_cpu", cpu, "cores", 0.0),
    ]


def _during(calls: Sequence[Call], peak: float, seconds: float, timeout_s: float) -> list[Result]:
    good = sum(call.count(RowResult) for call in calls if call.seconds <= timeout_s)
    admitted = [call.seconds for call in calls for _ in range(call.admitted)]
    rows = sum(len(call.outcomes) for call in calls)
    p99 = float(np.quantile(admitted, 0.99))
    return [
        Result("goodput_over_peak", good / seconds / peak, "x", 0.0),
        Result("admitted_p99_over_timeout", p99 / timeout_s, "x", 0.0),
        Result("admitted/p50", 1e3 * float(np.median(admitted)), "ms", 0.0),
        Result("admitted/p99", 1e3 * p99, "ms", 0.0),
        Result("refused", sum(call.count(Overloaded) for call in calls) / rows, "", 0.0),
        Result("ran_out_of_time", sum(call.count(DeadlineExceeded) for call in calls) / rows, "", 0.0),
    ]


def _refusals(calls: Sequence[Call], end: float) -> list[Result]:
    """``end``: of the overload. How soon rows are refused, and whether what they are told is true."""
    refused = [call.seconds for call in calls if call.count(Overloaded)]
    late = [call for call in calls if call.asked > end - _LAST_S]
    advice = [o.retry_after_s for call in late for o in call.outcomes if isinstance(o, Overloaded)]
    drained = max((call.answered for call in calls if call.admitted), default=end) - end
    if not advice:
        return [Result("drain", drained, "s", 0.0)]
    return [
        Result("refused/p99", 1e3 * float(np.quantile(refused, 0.99)), "ms", 0.0),
        Result("retry_after", statistics.median(advice), "s", 0.0),
        Result("drain", drained, "s", 0.0),
        Result("retry_after_over_drain", statistics.median(advice) / max(drained, 0.1), "x", 0.0),
    ]


def _recovery(before: Sequence[Call], after: Sequence[Call], end: float) -> float:
    """Seconds from ``end`` to the first call from which on the 99th percentile is like before; inf if it never is."""
    bound = _LIKE_BEFORE * _p99(before)
    calls = sorted(after, key=lambda call: call.asked)
    for index, call in enumerate(calls):
        if _p99(calls[index:]) <= bound:
            return call.asked - end
    return float("inf")


def _p99(calls: Sequence[Call]) -> float:
    """Of calls that were answered; one that was not took for ever."""
    return float(
        np.quantile([call.seconds if call.count(RowResult) else np.inf for call in calls], 0.99, method="higher")
    )


def _router() -> psutil.Process:
    title = f"ServeReplica:{_NAME}:router"
    (router,) = [p for p in psutil.Process().children(recursive=True) if title in " ".join(p.cmdline())]
    return router


async def _watch(router: psutil.Process) -> list[tuple[float, float]]:
    """Seconds and resident MiB, twice a second, until it is cancelled."""
    seen = []
    start = time.monotonic()
    try:
        while True:
            seen.append((time.monotonic() - start, router.memory_info().rss / (1 << 20)))
            await asyncio.sleep(0.5)
    except asyncio.CancelledError:
        return seen


def _slope(memory: Sequence[tuple[float, float]]) -> float:
    """MiB a minute, by least squares."""
    settled = [point for point in memory if point[0] >= _SETTLING_S] or memory
    if len(settled) < 2:
        return 0.0
    seconds, values = zip(*settled, strict=True)
    return 60 * float(np.polyfit(seconds, values, 1)[0])


if __name__ == "__main__":
    main()
