"""``build(args) -> Application``: what Serve configs and the command line start."""

# No postponed annotations in this module: Serve reads the type of build's argument from its signature.
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig

from adapter_router.config import EngineConfig, QuantizationConfig, RoutingConfig
from adapter_router.types import TaskKind
from deployments.api import build_http
from deployments.replica import MAX_CALLS, Replica
from deployments.router import AdapterSource, Router

APP_NAME = "adapter-router"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdapterArgs(_Strict):
    """An adapter to serve from the start."""

    name: str
    path: str
    task: TaskKind | None = None
    labels: tuple[str, ...] | None = None


class RoutingArgs(_Strict):
    """Fields and defaults of ``RoutingConfig``."""

    max_batch_rows: int = RoutingConfig.max_batch_rows
    batch_wait_s: float = RoutingConfig.batch_wait_s
    calls_per_replica: int = RoutingConfig.calls_per_replica
    max_queued_rows: int = RoutingConfig.max_queued_rows
    load_slack: float = RoutingConfig.load_slack
    copy_penalty: float = RoutingConfig.copy_penalty


class QuantizationArgs(_Strict):
    """Fields and defaults of ``QuantizationConfig``."""

    bits: int = QuantizationConfig.bits
    bits_pattern: dict[str, int] = {}


class AppArgs(_Strict):
    """Arguments of one application. Engine fields are those of ``EngineConfig``.

    ``num_cpus`` and ``num_gpus`` are what Ray reserves for each replica; ``num_gpus`` may be a fraction.
    ``store_dir`` holds the private copies of adapters and must be visible to all replicas.
    """

    base: str
    base_sha256: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    adapter_memory_bytes: int = EngineConfig.adapter_memory_bytes
    num_threads: int | None = None
    store_dir: str = Field(default_factory=lambda: str(_default_store()))
    replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    quantization: QuantizationArgs | None = None
    adapters: list[AdapterArgs] = []
    routing: RoutingArgs = RoutingArgs()


def build(args: AppArgs) -> serve.Application:
    """The application: a router with HTTP in front of ``args.replicas`` replicas."""
    engine = EngineConfig(
        base=args.base,
        base_sha256=args.base_sha256,
        device=args.device,
        dtype=args.dtype,
        adapter_memory_bytes=args.adapter_memory_bytes,
        num_threads=args.num_threads,
        max_batch_rows=args.routing.max_batch_rows,
        store_dir=Path(args.store_dir),
        quantization=QuantizationConfig(**args.quantization.model_dump()) if args.quantization else None,
    )
    replicas = serve.deployment(
        Replica,
        name="replica",
        num_replicas=args.replicas,
        max_ongoing_requests=MAX_CALLS,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.request_router:PinnedRequestRouter"
        ),
        health_check_period_s=1.0,
        health_check_timeout_s=90.0,  # a check waits for the forward that is running
        graceful_shutdown_wait_loop_s=0.1,
    )
    router = serve.deployment(
        serve.ingress(build_http)(Router),
        name="router",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=0.1,
    )
    adapters = [AdapterSource(a.name, a.path, a.task, a.labels) for a in args.adapters]
    routing = RoutingConfig(**args.routing.model_dump())
    return router.bind(replicas.bind(engine), routing, args.store_dir, adapters)


def _default_store() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "adapter-router" / "store"
