"""The demo's application on a local Ray, for the tests of the whole."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.handle import DeploymentHandle

from adapter_router.types import Row, RowOutcome
from deployments.app import AppArgs
from deployments.demo.tenants import ADAPTERS, BASE, BASE_SHA256


class Application:
    """A running application: its handle, its HTTP client and its processes."""

    def __init__(self, handle: DeploymentHandle, port: int) -> None:
        self.handle = handle
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def infer_many(self, rows: list[Row]) -> list[RowOutcome]:
        return self.handle.infer_many.remote(rows).result(timeout_s=120)  # type: ignore[no-any-return]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all samples of one name whose labels agree."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == f"adapter_router_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


def demo_args(store: Path, **changes: Any) -> AppArgs:
    """Two replicas of the real base with the four shipped adapters."""
    fields: dict[str, Any] = {
        "base": BASE,
        "base_sha256": BASE_SHA256,
        "device": "cpu",
        "num_threads": 1,
        "replicas": 2,
        "num_cpus": 0.1,
        "store_dir": str(store),
        "adapters": [{"name": name, "path": path} for name, path in ADAPTERS.items()],
    }
    return AppArgs(**{**fields, **changes})


def serve_pids(deployment: str) -> list[int]:
    """Living processes of one deployment of ours, by the title Ray gives them; only children of this process."""
    title = f"ServeReplica:adapter-router:{deployment}"
    return [p.pid for p in psutil.Process().children(recursive=True) if title in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until ``condition`` holds."""
    deadline = monotonic() + timeout_s
    while not condition():
        assert monotonic() < deadline, "condition did not come true in time"
        sleep(0.05)
