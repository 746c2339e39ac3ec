"""The contenders as Ray Serve applications, and how this process asks each: plain handle calls, one a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_router.types import Row, RowResult
from benchmarks.serving_peers.adapter_names import AdapterNames
from benchmarks.serving_peers.arrivals import TEXTS, Arrival
from benchmarks.serving_peers.open_loop import Ask
from benchmarks.serving_peers.set_adapter import CACHED, SetAdapter
from deployments.app import AppArgs
from deployments.demo.tenants import BASE
from deployments.local import deploy

OURS, MULTIPLEXED, BATCHED = "ours", "multiplexed+set_adapter", "batch+adapter_names"
REPLICAS = 2
_BATCHED_MOST = 8  # adapters: all are loaded on every replica
_IN_FLIGHT = 128  # calls a replica of ``@serve.batch`` takes: enough to fill its batches


@dataclass(frozen=True)
class System:
    """A running application; ``logits`` of one request are (rows, labels)."""

    name: str
    handle: DeploymentHandle

    async def logits(self, arrival: Arrival) -> NDArray[np.float32]:
        """One request. Raises what kept it from being answered."""
        texts = [TEXTS[number] for number in arrival.texts]
        if self.name == MULTIPLEXED:
            return await self.handle.options(multiplexed_model_id=arrival.adapter).infer.remote(texts)  # type: ignore[no-any-return]
        if self.name == BATCHED:
            return await self.handle.infer.remote((arrival.adapter, texts))  # type: ignore[no-any-return]
        rows = [Row(text, arrival.adapter) for text in texts]
        outcomes: Any = [await self.handle.infer.remote(*rows)] if len(rows) == 1 else await self._many(rows)
        for outcome in outcomes:
            if not isinstance(outcome, RowResult):
                raise outcome
        return np.stack([outcome.logits for outcome in outcomes])

    @property
    def ask(self) -> Ask:
        """For an open loop, which only wants to know when."""
        return self.logits

    async def _many(self, rows: list[Row]) -> Any:
        return await self.handle.infer_many.remote(rows)


def start(directories: Mapping[str, Path], folder: Path, contenders: tuple[str, ...]) -> list[System]:
    """Two replicas of one thread each for every contender that can serve so many adapters."""
    systems = []
    for name in contenders:
        if name == OURS:
            handle = deploy(ours(directories, folder / "store"), name, f"/{name}")
        elif name == MULTIPLEXED:
            handle = serve.run(_deployment(SetAdapter).bind(directories), name=name, route_prefix=None)
        elif len(directories) > _BATCHED_MOST:
            continue
        else:
            options = {"max_ongoing_requests": _IN_FLIGHT}
            handle = serve.run(_deployment(AdapterNames, **options).bind(directories), name=name, route_prefix=None)
        systems.append(System(name, handle))
    return systems


def stop(systems: list[System]) -> None:
    """Free their processes."""
    for system in systems:
        serve.delete(system.name)


def ours(directories: Mapping[str, Path], store: Path, replicas: int = REPLICAS) -> AppArgs:
    """Our application; its replicas have room for as many bytes of adapters as a peer's for adapters."""
    sizes = [(directory / "adapter_model.safetensors").stat().st_size for directory in directories.values()]
    return AppArgs.model_validate(
        {
            "base": BASE,
            "device": "cpu",
            "num_threads": 1,
            "num_cpus": 0.1,
            "replicas": replicas,
            "adapter_memory_bytes": CACHED * sum(sizes) // len(sizes),
            "store_dir": str(store),
            "adapters": [{"name": name, "path": str(directory)} for name, directory in directories.items()],
        }
    )


def _deployment(peer: type, **options: Any) -> Any:
    return serve.deployment(
        num_replicas=REPLICAS,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        **options,
    )(peer)
