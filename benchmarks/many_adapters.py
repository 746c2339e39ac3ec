"""What do thousands of adapters cost? Throughput over 2,000 of 10,000 registered adapters against that over 5.

    python -m benchmarks.many_adapters [--json PATH] [--rounds 7] [--served 2000] [--registered 10000]

The demo's MiniLM behind two replicas whose devices have room for 64 adapters each, rank 8 on query and value, each with
a head of its own. Rows are drawn by true Zipf(1.0). Three mixes of the same rows take turns: over 5 adapters, over all
with a host tier that holds them (S-LoRA's case: its own ratio is 0.945 on an A100), and over all with a host tier of 64
per replica, so that most misses read the disk. Start-up with 10 and with all registered is timed as well.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from safetensors.numpy import load_file, save_file

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.location import resolve
from adapter_router.catalog.records import AdapterSpec
from adapter_router.types import Row, RowResult, Source
from benchmarks.harness import Result, interleaved, ratio, summary, write_json
from deployments.app import AppArgs
from deployments.demo.tenants import ADAPTERS, BASE
from deployments.local import deploy, local_ray

_SLOTS = 64
_FEW = 5
_CALLERS = 8
_ROWS = 32  # of one call
_CALLS = 60  # of one round
_TIMEOUT_S = 300.0
_TEXT = "please tell me where my parcel is and when it will be here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--served", type=int, default=2000)
    parser.add_argument("--registered", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-adapters-") as folder:
        results = measure(Path(folder), args.served, args.registered, args.rounds)
    if args.json:
        write_json(args.json, "many_adapters", results)


def measure(folder: Path, served: int, registered: int, rounds: int) -> list[Result]:
    """All figures; ``folder`` takes the adapters and the stores."""
    num_bytes = _write_adapters(folder / "adapters", served)
    apps = {
        "few": (10, 1 << 30),
        "all": (registered, served * num_bytes),
        "all-from-disk": (registered, _SLOTS * num_bytes),
    }
    results = []
    with local_ray(8123):
        started = {}
        for name, (count, host_bytes) in apps.items():
            store = folder / name
            _register(store / "catalog.db", folder / "adapters", served, count)
            start = time.perf_counter()
            args = {
                "base": BASE,
                "device": "cpu",
                "num_threads": 1,
                "num_cpus": 0.1,
                "replicas": 2,
                "adapter_memory_bytes": _SLOTS * num_bytes,
                "host_memory_bytes": host_bytes,
                "store_dir": str(store),
                "catalog": f"sqlite:///{store}/catalog.db",
            }
            handle = deploy(AppArgs.model_validate(args), name, f"/{name}")
            started[name] = time.perf_counter() - start
            results += _throughput(name, handle, served, rounds) if name != "few" else []
            serve.delete(name)
    print(f"start-up with 10 registered {started['few']:.1f} s, with {registered} {started['all']:.1f} s", flush=True)
    results.append(Result("startup/all_over_few", started["all"] / started["few"], "x", 0.0))
    return results


def _throughput(name: str, handle: serve.handle.DeploymentHandle, served: int, rounds: int) -> list[Result]:
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, served + 1)

    def calls(adapters: int) -> Iterator[list[Row]]:
        p = shares[:adapters] / shares[:adapters].sum()
        while True:
            yield [Row(_TEXT, _name(int(index))) for index in rng.choice(adapters, _ROWS, p=p)]

    def run(source: Iterator[list[Row]]) -> None:
        with ThreadPoolExecutor(_CALLERS) as callers:
            list(callers.map(lambda rows: _ask(handle, rows), itertools.islice(source, _CALLS)))

    start = time.perf_counter()
    with ThreadPoolExecutor(_CALLERS) as callers:
        everybody = [_name(index) for index in range(served)]
        list(callers.map(lambda names: _ask(handle, [Row(_TEXT, n) for n in names]), _chunks(everybody, _ROWS)))
    first = served / (time.perf_counter() - start)
    few, many = calls(_FEW), calls(served)
    before = _counters(handle)
    seconds = interleaved({"few": lambda: run(few), "many": lambda: run(many)}, rounds)
    counted = {key: value - before[key] for key, value in _counters(handle).items()}
    rows = counted["cache_hits_total"] + counted["cache_misses_total"]
    kept = ratio(f"{name}/{served}_over_{_FEW}", seconds["few"], seconds["many"])
    speed = summary(f"{name}/rows_per_s", [_CALLS * _ROWS / s for s in seconds["many"]], "1/s")
    loads = Result(f"{name}/loads_per_1000_rows", 1000 * counted["adapter_loads_total"] / rows, "", 0.0)
    print(
        f"{name:14} {served} adapters over {_FEW}: {kept.value:.3f}±{kept.spread:.3f}  {speed.value:.0f} rows/s  "
        f"{loads.value:.0f} loads from disk per 1000 rows (of both mixes)  first rows {first:.0f} adapters/s",
        flush=True,
    )
    return [kept, speed, loads, Result(f"{name}/first_loads_per_s", first, "1/s", 0.0)]


def _ask(handle: serve.handle.DeploymentHandle, rows: Sequence[Row]) -> None:
    outcomes = handle.infer_many.remote(list(rows)).result(timeout_s=_TIMEOUT_S)
    failed = [outcome for outcome in outcomes if not isinstance(outcome, RowResult)]
    assert not failed, failed[0]


def _counters(handle: serve.handle.DeploymentHandle) -> Mapping[str, float]:
    text = handle.metrics_text.remote().result(timeout_s=_TIMEOUT_S)
    totals = {"cache_hits_total": 0.0, "cache_misses_total": 0.0, "adapter_loads_total": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("adapter_router_")
            if name in totals:
                totals[name] += sample.value
    return totals


def _write_adapters(folder: Path, count: int) -> int:
    """Random adapters in the form of one of the demo's; returns what one holds on a device in float32, in bytes."""
    template = Path(resolve(ADAPTERS["language"]))
    tensors = load_file(template / "adapter_model.safetensors")
    rng = np.random.default_rng(0)
    for index in range(count):
        directory = folder / _name(index)
        shutil.copytree(template, directory)
        drawn = {key: (rng.standard_normal(t.shape) * t.std()).astype(t.dtype) for key, t in tensors.items()}
        save_file(drawn, directory / "adapter_model.safetensors")
    return sum(tensor.size * np.dtype(np.float32).itemsize for tensor in tensors.values())


def _register(database: Path, adapters: Path, served: int, count: int) -> None:
    """``count`` lazy registrations, of which the first ``served`` have files of their own."""
    catalog = Catalog(f"sqlite:///{database}")
    names = [(_name(index), adapters / _name(index % served)) for index in range(count)]
    catalog.reconcile([AdapterSpec(name, Source(str(directory)), lazy=True) for name, directory in names])
    catalog.close()


def _name(index: int) -> str:
    return f"tenant-{index:05}"


def _chunks(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


if __name__ == "__main__":
    main()
