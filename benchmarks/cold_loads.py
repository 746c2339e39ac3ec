"""What do loads cost those who need none? p99 of hot adapters' batches while cold ones load at 10/s, over p99 without.

    python -m benchmarks.cold_loads [--json PATH] [--rounds 9] [--seconds 6]

One engine, the demo's MiniLM, one thread for forwards. Batches of 8 rows of the four demo tenants, one after another
with short pauses. Three phases take turns: nobody loads; ten cold adapters a second are read, checked and converted
from disk (no host tier keeps them); ten a second are asked for whose sources fail, half at once and half by hanging.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from adapter_router.catalog.location import resolve
from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRouterError, AdapterUnavailable
from adapter_router.types import AdapterVersion, Row, RowResult, Source
from benchmarks.harness import Result, summary, write_json
from deployments.demo.tenants import ADAPTERS, BASE, SAMPLES

_PER_S = 10.0
_ROWS = 8
_COLD = 60
_DEVICE_BYTES = 20_000_000

_PHASES = ("quiet", "loads", "failures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.rounds, args.seconds)
    if args.json:
        write_json(args.json, "cold_loads", results)


def measure(folder: Path, rounds: int, seconds: float) -> list[Result]:
    """p99 of hot batches in each phase over that of the quiet one, round by round."""
    over = threading.Event()

    def obtain(version: AdapterVersion) -> StoredAdapter:
        if version.directory is not None:
            return StoredAdapter(version.digest, Path(version.directory))
        if version.adapter.startswith("hangs"):
            over.wait()
        raise AdapterUnavailable("the source answers 500")

    config = EngineConfig(
        base=BASE, device="cpu", adapter_memory_bytes=_DEVICE_BYTES, host_memory_bytes=0, store_dir=folder / "store"
    )
    with Engine(config, obtain) as engine:
        hot = [engine.load_adapter(name, directory).version for name, directory in ADAPTERS.items()]
        cold = cycle(_cold_versions(engine, folder))
        broken = (_broken(hot[0], number) for number in range(1_000_000))
        texts = [text for texts in SAMPLES.values() for text in texts]
        versions = [hot[row % len(hot)] for row in range(_ROWS)]
        rows = [Row(text, version.adapter) for text, version in zip(texts, versions, strict=False)]
        wanted = {"quiet": None, "loads": cold, "failures": broken}
        p99: dict[str, list[float]] = {phase: [] for phase in _PHASES}
        _batches(engine, rows, versions, seconds)  # warm-up
        before = engine.metrics.loads._value.get()
        for _ in range(rounds):
            for phase in _PHASES:
                with _asking(engine, wanted[phase]):
                    p99[phase].append(float(np.percentile(_batches(engine, rows, versions, seconds), 99)))
        loads = (engine.metrics.loads._value.get() - before) / (rounds * seconds)
        over.set()
    ratios = {p: [a / b for a, b in zip(p99[p], p99["quiet"], strict=True)] for p in _PHASES[1:]}
    results = [summary(f"{phase}/p99_over_quiet", values, "x") for phase, values in ratios.items()]
    results.append(Result("loads/per_s", loads, "1/s", 0.0))
    quiet = summary("quiet/p99_ms", [1e3 * value for value in p99["quiet"]], "ms")
    print(
        f"hot batches of {_ROWS}: p99 {quiet.value:.1f} ms while nobody loads; x{results[0].value:.3f}"
        f"±{results[0].spread:.3f} at {loads:.1f} loads/s; x{results[1].value:.3f}±{results[1].spread:.3f} while "
        f"{_PER_S:.0f} sources a second fail or hang",
        flush=True,
    )
    return [*results, quiet]


def _batches(engine: Engine, rows: list[Row], versions: list[AdapterVersion], seconds: float) -> list[float]:
    """Seconds of each batch."""
    took = []
    stop = time.perf_counter() + seconds
    while (start := time.perf_counter()) < stop:
        results = engine.infer_versions(rows, versions)
        took.append(time.perf_counter() - start)
        assert all(isinstance(result, RowResult) for result in results)
        time.sleep(0.004)
    return took


@contextmanager
def _asking(engine: Engine, wanted: Iterator[AdapterVersion] | None) -> Iterator[None]:
    """Ask for one adapter after the other until the end of the block."""
    done = threading.Event()

    def ask() -> None:
        while wanted is not None and not done.wait(1 / _PER_S):
            try:
                engine.prefetch(next(wanted))
            except AdapterRouterError:
                continue  # refused at once: it has failed before

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _cold_versions(engine: Engine, folder: Path) -> list[AdapterVersion]:
    """Random adapters in the form of one of the demo's, on disk only."""
    template = Path(resolve(ADAPTERS["language"]))
    tensors = load_file(template / "adapter_model.safetensors")
    rng = np.random.default_rng(0)
    versions = []
    for number in range(_COLD):
        directory = folder / f"cold-{number}"
        shutil.copytree(template, directory)
        drawn = {key: rng.standard_normal(t.shape, dtype=np.float32) * t.std() for key, t in tensors.items()}
        save_file(drawn, directory / "adapter_model.safetensors")
        versions.append(engine.load_adapter(f"cold-{number}", directory).version)
        engine.evict(versions[-1].digest)
    return versions


def _broken(like: AdapterVersion, number: int) -> AdapterVersion:
    name = f"{'hangs' if number % 2 else 'fails'}-{number}"
    source = Source(f"https://{name}.invalid/adapter")
    return replace(like, adapter=name, digest=f"sha256:{number:064x}", directory=None, source=source)


if __name__ == "__main__":
    main()
