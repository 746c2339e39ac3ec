"""Configuration: frozen, checked once, never written after start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a base model on a device, and the room it has for adapters.

    ``base``: a directory, a hub id, or ``package:module/subdir`` for a model inside an installed package.
    ``base_sha256``: expected digest of the base's ``model.safetensors``; the engine refuses to start on another.
    ``device``: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``….
    ``dtype``: of the base; ``auto`` keeps the checkpoint's own, which is also what lets CPU replicas on one node
    share the weights' memory pages. LoRA is computed in float32 whatever the base's dtype.
    ``adapter_memory_bytes``: device memory for resident adapters; each costs its own bytes.
    ``store_dir``: where private copies of adapters live; None is a temporary directory, removed on ``close``.
    """

    base: str
    device: str = "auto"
    dtype: str = "auto"
    base_sha256: str | None = None
    adapter_memory_bytes: int = 1 << 30
    max_batch_rows: int = 64
    num_threads: int | None = None
    store_dir: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.base:
            problems.append("base is empty")
        if self.dtype not in _DTYPES:
            problems.append(f"dtype {self.dtype!r} is none of {', '.join(_DTYPES)}")
        for name in ("adapter_memory_bytes", "max_batch_rows"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.num_threads is not None and self.num_threads < 1:
            problems.append(f"num_threads is {self.num_threads}, must be at least 1")
        if problems:
            raise ValueError("EngineConfig: " + "; ".join(problems))


@dataclass(frozen=True)
class RoutingConfig:
    """How the router forms batches and spreads them.

    ``batch_wait_s``: how long the oldest row may wait for company while a replica is free.
    ``calls_per_replica``: batches a replica may hold at once; 2 lets it tokenise one while it computes the other.
    ``load_slack``: a replica is passed over when it holds more than ``(1 + load_slack) * mean + max_batch_rows`` rows.
    ``copy_penalty``: how many times its load time a second copy of a resident adapter must save.
    """

    max_batch_rows: int = 32
    batch_wait_s: float = 0.002
    calls_per_replica: int = 2
    max_queued_rows: int = 10_000
    load_slack: float = 0.25
    copy_penalty: float = 4.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, must be at least {low}"
            for name, low in (
                ("max_batch_rows", 1),
                ("batch_wait_s", 0),
                ("calls_per_replica", 1),
                ("max_queued_rows", 1),
                ("load_slack", 0),
                ("copy_penalty", 1),
            )
            if getattr(self, name) < low
        ]
        if problems:
            raise ValueError("RoutingConfig: " + "; ".join(problems))
