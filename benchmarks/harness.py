"""Interleaved timing, and the JSON every benchmark writes."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """One figure; ``spread`` is half the distance between its lower and upper quartile."""

    name: str
    value: float
    unit: str
    spread: float


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round; all of them run once a round, so that drift hits all alike."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(name: str, slower: list[float], faster: list[float]) -> Result:
    """Throughput of ``faster`` over ``slower``, round by round: above 1 means ``faster`` deserves its name."""
    return summary(name, [s / f for s, f in zip(slower, faster, strict=True)], "x")


def summary(name: str, values: list[float], unit: str) -> Result:
    """Median and quartile spread of ``values``."""
    if len(values) < 2:
        return Result(name, values[0], unit, 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Result(name, statistics.median(values), unit, (high - low) / 2)


def write_json(path: Path, benchmark: str, results: list[Result]) -> None:
    """``{"benchmark", "environment", "results"}``."""
    document = {"benchmark": benchmark, "environment": environment(), "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def environment() -> dict[str, object]:
    """What the figures depend on."""
    names = ("torch", "transformers", "peft")
    return {
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
