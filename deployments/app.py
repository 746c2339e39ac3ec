"""``build(args) -> Application``: what Serve configs and the command line start."""

# No postponed annotations in this module: Serve reads the type of build's argument from its signature.
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from ray import serve
from ray.serve.config import RequestRouterConfig

from adapter_router.catalog.records import AdapterSpec
from adapter_router.config import CatalogConfig, EngineConfig, QuantizationConfig, RoutingConfig, SourceConfig
from adapter_router.types import Source, TaskKind
from deployments.api import build_http
from deployments.autoscaling import Knobs, for_replicas, for_routers
from deployments.replica import MAX_CALLS, Replica
from deployments.router import Router

APP_NAME = "adapter-router"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdapterArgs(_Strict):
    """An adapter to serve from the start; ``path`` is a directory or a URI."""

    name: str
    path: str
    base: str | None = None
    task: TaskKind | None = None
    labels: tuple[str, ...] | None = None
    pinned: bool = False
    preload: bool = False

    def spec(self) -> AdapterSpec:
        """As the catalog knows it."""
        return AdapterSpec(
            self.name, Source(self.path), self.base, self.task, self.labels, pinned=self.pinned, preload=self.preload
        )


class RoutingArgs(_Strict):
    """Fields and defaults of ``RoutingConfig``."""

    max_batch_rows: int = RoutingConfig.max_batch_rows
    max_batch_tokens: int = RoutingConfig.max_batch_tokens
    max_padding: float = RoutingConfig.max_padding
    batch_wait_s: float = RoutingConfig.batch_wait_s
    calls_per_replica: int = RoutingConfig.calls_per_replica
    cold_calls_per_replica: int = RoutingConfig.cold_calls_per_replica
    max_queued_rows: int = RoutingConfig.max_queued_rows
    max_queued_tokens: int = RoutingConfig.max_queued_tokens
    tenant_weights: dict[str, float] = {}
    max_wait_s: float = RoutingConfig.max_wait_s
    timeout_s: float = RoutingConfig.timeout_s
    load_slack: float = RoutingConfig.load_slack
    copy_penalty: float = RoutingConfig.copy_penalty
    patience: float = RoutingConfig.patience
    min_patience_s: float = RoutingConfig.min_patience_s
    retry_budget: float = RoutingConfig.retry_budget
    warm_up_s: float = RoutingConfig.warm_up_s


class QuantizationArgs(_Strict):
    """Fields and defaults of ``QuantizationConfig``."""

    bits: int = QuantizationConfig.bits
    bits_pattern: dict[str, int] = {}


class AutoscalingArgs(_Strict):
    """Fields and defaults of ``Knobs``. The application needs ``POLICY`` as its ``autoscaling_policy``, too."""

    max_replicas: int
    min_replicas: int = Knobs.min_replicas
    memory_fill: float = Knobs.memory_fill
    target_tokens_per_replica: int = Knobs.target_tokens_per_replica
    max_loading_fraction: float = Knobs.max_loading_fraction
    max_evictions_s: float = Knobs.max_evictions_s
    max_misses_s: float = Knobs.max_misses_s
    max_wait_s: float = Knobs.max_wait_s
    upscale_delay_s: float = Knobs.upscale_delay_s
    downscale_delay_s: float = Knobs.downscale_delay_s
    downscale_to_zero_delay_s: float = Knobs.downscale_to_zero_delay_s
    downscale_margin: float = Knobs.downscale_margin
    settle_s: float = Knobs.settle_s
    report_interval_s: float = Knobs.report_interval_s

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.knobs()
        return self

    def knobs(self) -> Knobs:
        """As the policy knows them. Raises ValueError with all that is wrong."""
        return Knobs(**self.model_dump())


class BaseArgs(_Strict):
    """One base model and its replicas. Engine fields are those of ``EngineConfig``.

    ``num_cpus`` and ``num_gpus`` are what Ray reserves for each replica; ``num_gpus`` may be a fraction.
    ``replicas`` is how many there are, unless ``autoscaling`` says between how many.
    """

    base: str
    base_sha256: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    adapter_memory_bytes: int = EngineConfig.adapter_memory_bytes
    host_memory_bytes: int = EngineConfig.host_memory_bytes
    loader_threads: int = EngineConfig.loader_threads
    num_threads: int | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: AutoscalingArgs | None = None
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    quantization: QuantizationArgs | None = None

    def engine(self, max_batch_rows: int, store_dir: Path) -> EngineConfig:
        """Of each of its replicas."""
        return EngineConfig(
            base=self.base,
            base_sha256=self.base_sha256,
            device=self.device,
            dtype=self.dtype,
            adapter_memory_bytes=self.adapter_memory_bytes,
            host_memory_bytes=self.host_memory_bytes,
            loader_threads=self.loader_threads,
            num_threads=self.num_threads,
            max_batch_rows=max_batch_rows,
            store_dir=store_dir,
            quantization=QuantizationConfig(**self.quantization.model_dump()) if self.quantization else None,
        )


class SourceArgs(_Strict):
    """Fields and defaults of ``SourceConfig``."""

    allowed: tuple[str, ...] = tuple(SourceConfig.allowed)
    timeout_s: float = SourceConfig.timeout_s
    idle_timeout_s: float = SourceConfig.idle_timeout_s
    attempts: int = SourceConfig.attempts
    backoff_s: float = SourceConfig.backoff_s
    secrets_dir: Path | None = None


class AppArgs(BaseArgs):
    """Arguments of one application: its first base, and what all bases share.

    ``catalog``: the database's URL, ``sqlite:///…`` or ``postgresql+psycopg://…`` (which several routers on several
    nodes can share); by default a file in ``store_dir``. ``store_dir`` holds each node's private copies of adapters, at
    most ``store_bytes`` of them. ``adapters`` and the file ``manifest`` together declare what shall be served.
    """

    more_bases: list[BaseArgs] = []
    catalog: str | None = None
    store_dir: str = Field(default_factory=lambda: str(_default_store()))
    store_bytes: PositiveInt | None = None
    sources: SourceArgs = SourceArgs()
    adapters: list[AdapterArgs] = []
    manifest: str | None = None
    routers: PositiveInt = 1
    routing: RoutingArgs = RoutingArgs()

    @property
    def bases(self) -> list[BaseArgs]:
        """All of them, the first one first."""
        return [self, *self.more_bases]

    @property
    def autoscaled(self) -> list[Knobs]:
        """Of the bases whose number of replicas is decided by adapter load."""
        return [base.autoscaling.knobs() for base in self.bases if base.autoscaling is not None]


_LARGEST = 4  # times what a device has room for: a file may be float64 where two bytes are served


def build(args: AppArgs) -> serve.Application:
    """The application: routers with HTTP in front of replicas of every base."""
    catalog = catalog_of(args)
    scale: dict[str, Any] = {"num_replicas": args.routers}
    if args.autoscaled:
        interval_s = min(knobs.report_interval_s for knobs in args.autoscaled)
        scale = {"autoscaling_config": for_routers(args.routers, interval_s)}
    router = serve.deployment(
        serve.ingress(build_http)(Router),
        name="router",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        **scale,
    )
    replicas = [_replicas(base, number, args, catalog) for number, base in enumerate(args.bases)]
    cold_calls = max(1, args.routing.cold_calls_per_replica // args.routers)  # a replica has so many threads
    routing = RoutingConfig(**{**args.routing.model_dump(), "cold_calls_per_replica": cold_calls})
    scales = [base.autoscaling for base in args.bases]
    may_sleep = [_deployment(n) for n, knobs in enumerate(scales) if knobs and not knobs.min_replicas]
    return router.bind(replicas, routing, catalog, [adapter.spec() for adapter in args.adapters], may_sleep)


def catalog_of(args: AppArgs) -> CatalogConfig:
    """What routers and replicas know of the catalog; no larger file is fetched than the largest device has room for."""
    return CatalogConfig(
        url=args.catalog,
        store_dir=Path(args.store_dir),
        store_bytes=args.store_bytes,
        max_adapter_bytes=_LARGEST * max(base.adapter_memory_bytes for base in args.bases),
        sources=SourceConfig(**args.sources.model_dump()),
        manifest=Path(args.manifest) if args.manifest else None,
    )


def _replicas(base: BaseArgs, number: int, args: AppArgs, catalog: CatalogConfig) -> serve.Application:
    """Replicas of one base."""
    scale: dict[str, Any] = {"num_replicas": base.replicas}
    if base.autoscaling is not None:
        scale = {"autoscaling_config": for_replicas(base.autoscaling.knobs())}
    deployment = serve.deployment(
        Replica,
        name=_deployment(number),
        max_ongoing_requests=MAX_CALLS,
        ray_actor_options={"num_cpus": base.num_cpus, "num_gpus": base.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.request_router:PinnedRequestRouter"
        ),
        health_check_period_s=1.0,
        health_check_timeout_s=90.0,  # a check waits for the forward that is running
        graceful_shutdown_wait_loop_s=0.1,
        **scale,
    )
    return deployment.bind(base.engine(args.routing.max_batch_rows, Path(args.store_dir)), catalog)


def _deployment(number: int) -> str:
    """The name of the replicas' deployment of one base; the first one's has no number."""
    return f"replica-{number}" if number else "replica"


def _default_store() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "adapter-router" / "store"
