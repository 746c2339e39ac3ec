"""What do cold loads cost those who wait for none? The p99 of calls on hot adapters, with others loading over without.

    python -m benchmarks.cold_loads [--json PATH] [--rounds 12] [--seconds 3] [--rate 10] [--switch-interval 0.0005]

One engine on the demo's MiniLM, one thread of torch's, one caller that asks its four text classifiers 8 rows at a time.
Beside it, in turns of a few seconds and ``--rate`` times a second: nothing; a cold adapter is loaded, of a form that is
known (as most are that one trainer wrote) or of one never seen; a source is asked that hangs, or fails. In the last two
turns a row comes beside it, of an adapter in memory or of a cold one. All ratios are of the pooled p99 of all turns,
spreads of each round's own; 1.0 means that loads cost the others nothing. ``--switch-interval``: Python's, in seconds;
by default that of our replicas.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from adapter_router.catalog.location import resolve
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.engine.loading import SWITCH_INTERVAL_S
from adapter_router.engine.reading import admitted_copy
from adapter_router.errors import AdapterUnavailable
from adapter_router.types import AdapterVersion, Row, RowResult, Source
from benchmarks.harness import Result, summary, write_json
from deployments.demo.tenants import ADAPTERS, BASE, SAMPLES

_ROWS = 8
_ALIKE = 48  # more than fit
_UNLIKE = 300  # more than an engine remembers the forms of
_ROOM = 10  # adapters on the device
_WARMUP_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--switch-interval", type=float, default=SWITCH_INTERVAL_S)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(args.switch_interval)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="cold-loads-") as folder:
        results = measure(Path(folder), args.rounds, args.seconds, args.rate)
    if args.json:
        write_json(args.json, "cold_loads", results)


class Sources:
    """Finds copies in the store; ``hang`` and ``fail`` are sources that never answer and that always fail."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def __call__(self, version: AdapterVersion) -> StoredAdapter:
        if version.adapter == "hang":
            self.ended.wait()
        if version.adapter in ("hang", "fail"):
            raise AdapterUnavailable("the source does not answer")
        return admitted_copy(version)


def measure(folder: Path, rounds: int, seconds: float, rate: float) -> list[Result]:
    """All ratios; ``folder`` takes the cold adapters."""
    template = Path(resolve(ADAPTERS["language"]))
    num_bytes = (template / "adapter_model.safetensors").stat().st_size
    config = EngineConfig(
        base=BASE, device="cpu", adapter_memory_bytes=_ROOM * num_bytes, host_memory_bytes=0, store_dir=folder / "store"
    )
    sources = Sources()
    with Engine(config, sources) as engine:
        hot = [engine.load_adapter(name, directory).version for name, directory in ADAPTERS.items()]
        store = ContentStore(folder / "store")
        alike = _admitted(engine, store, template, folder / "alike", [None] * _ALIKE)
        unlike = _admitted(engine, store, template, folder / "unlike", [8 + i / 100 for i in range(_UNLIKE)])
        turns = _turns(engine, hot, alike, unlike)
        texts = [text for name in ADAPTERS for text in SAMPLES[name]]
        versions = [hot[index % len(hot)] for index in range(_ROWS)]
        rows = [Row(texts[index], version.adapter) for index, version in enumerate(versions)]

        def call() -> None:
            assert all(isinstance(outcome, RowResult) for outcome in engine.infer_versions(rows, versions))

        _repeat(call, _WARMUP_S)
        taken: dict[str, list[list[float]]] = defaultdict(list)
        for _ in range(rounds):
            for name, beside in turns.items():
                with ThreadPoolExecutor(4) as threads:
                    stop = threading.Event()
                    ticking = threads.submit(_tick, beside, threads, rate, stop)
                    taken[name].append(_repeat(call, seconds))
                    stop.set()
                ticking.result()
        loads = engine.metrics.registry.get_sample_value("adapter_router_adapter_loads_total") or 0.0
        sources.ended.set()
    print(f"{loads - len(hot) - _ALIKE - _UNLIKE:.0f} loads, {1e3 * engine.load_s:.1f} ms each")
    return _results(taken)


def _turns(
    engine: Engine, hot: Sequence[AdapterVersion], alike: Sequence[AdapterVersion], unlike: Sequence[AdapterVersion]
) -> dict[str, Callable[[], None]]:
    """What happens beside the caller, once a tick."""

    def loads(versions: Sequence[AdapterVersion]) -> Callable[[], None]:
        order = itertools.cycle(versions)
        return lambda: engine.prefetch(next(order))

    def rows(versions: Sequence[AdapterVersion]) -> Callable[[], None]:
        order = itertools.cycle(versions)

        def ask() -> None:
            version = next(order)
            (outcome,) = engine.infer_versions([Row("a row beside the others", version.adapter)], [version])
            assert isinstance(outcome, RowResult), outcome

        return ask

    half = len(alike) // 2
    return {
        "quiet": lambda: None,
        "known forms": loads(alike[:half]),
        "new forms": loads(unlike),
        "hanging": loads_of("hang", engine, hot[0]),
        "failing": loads_of("fail", engine, hot[0]),
        "warm rows": rows(hot),
        "cold rows": rows(alike[half:]),
    }


def loads_of(name: str, engine: Engine, like: AdapterVersion) -> Callable[[], None]:
    """Each tick another adapter of the source ``name``."""
    numbers = itertools.count()

    def ask() -> None:
        number = next(numbers)
        digest = f"sha256:{name}{number}"
        engine.prefetch(
            replace(like, adapter=name, digest=digest, directory=None, source=Source(f"https://{name}.test/{number}"))
        )

    return ask


def _tick(beside: Callable[[], None], threads: ThreadPoolExecutor, rate: float, stop: threading.Event) -> None:
    pending = []
    while not stop.wait(1 / rate):
        pending.append(threads.submit(beside))
    for done in pending:
        done.result()


def _repeat(call: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each call."""
    taken = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        taken.append(time.perf_counter() - start)
        time.sleep(0.1 * taken[-1])  # what a caller does with the answer
    return taken


def _results(taken: Mapping[str, list[list[float]]]) -> list[Result]:
    results = []
    for name, rounds in taken.items():
        peer = "warm rows" if name == "cold rows" else "quiet"
        seconds = [second for turn in rounds for second in turn]
        milliseconds = [1e3 * float(np.percentile(seconds, share)) for share in (50, 90, 99)]
        shown = "  ".join(f"{value:7.1f}" for value in milliseconds)
        line = f"{name:12} p50, p90, p99 {shown} ms of {len(seconds)} calls"
        if name in ("quiet", "warm rows"):
            print(line, flush=True)
            continue
        own = [
            np.percentile(turn, 99) / np.percentile(other, 99) for turn, other in zip(rounds, taken[peer], strict=True)
        ]
        spread = summary(name, [float(value) for value in own], "x").spread
        pooled = float(np.percentile(seconds, 99) / np.percentile([s for turn in taken[peer] for s in turn], 99))
        print(f"{line}  p99 over {peer} {pooled:.3f}±{spread:.3f}", flush=True)
        results.append(Result(f"{name}/p99_over_{peer.replace(' ', '_')}", pooled, "x", spread))
    return results


def _admitted(
    engine: Engine, store: ContentStore, template: Path, folder: Path, alphas: Sequence[float | None]
) -> list[AdapterVersion]:
    """Cold copies of ``template`` with random weights; each ``alpha`` that is not None makes a form of its own."""
    return [engine.admit(d.name, store.admit(d), keep=False).version for d in _written(template, folder, alphas)]


def _written(template: Path, folder: Path, alphas: Sequence[float | None]) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    tensors = load_file(template / "adapter_model.safetensors")
    config = json.loads((template / "adapter_config.json").read_text())
    for index, alpha in enumerate(alphas):
        directory = folder / f"{folder.name}-{index}"
        shutil.copytree(template, directory)
        drawn = {key: rng.standard_normal(t.shape, dtype=np.float32) * t.std() for key, t in tensors.items()}
        save_file(drawn, directory / "adapter_model.safetensors")
        if alpha is not None:
            (directory / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
        yield directory
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
