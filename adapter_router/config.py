"""Configuration: frozen, checked once, never written after start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATION_BITS = (2, 3, 4, 8, 16)


@dataclass(frozen=True)
class QuantizationConfig:
    """How many bits a base's linear layers take; 16 leaves a layer as it is.

    ``bits_pattern``: expressions for module paths -> bits, instead of ``bits``. An expression matches the end of a path
    at a dot, and the first that matches decides, as in PEFT's ``rank_pattern``: two configurations in another order are
    not equal.
    """

    bits: int = 4
    bits_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.bits_pattern, Mapping):
            raise ValueError(f"QuantizationConfig: bits_pattern is {self.bits_pattern!r:.80}, must be a mapping")
        object.__setattr__(self, "bits_pattern", dict(self.bits_pattern))  # nobody else's to change
        known = ", ".join(map(str, QUANTIZATION_BITS))
        widths = {"bits": self.bits, **{f"bits_pattern[{key!r:.80}]": bits for key, bits in self.bits_pattern.items()}}
        problems = [
            f"{name} is {bits!r:.80}, must be one of {known}"
            for name, bits in widths.items()
            if type(bits) is not int or bits not in QUANTIZATION_BITS
        ]
        for key in self.bits_pattern:
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                problems.append(f"bits_pattern {key!r:.80} is not a regular expression: {error}")
        if problems:
            raise ValueError("QuantizationConfig: " + "; ".join(problems))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationConfig) and self._in_order() == other._in_order()

    def __hash__(self) -> int:
        return hash(self._in_order())

    def _in_order(self) -> tuple[object, ...]:
        return (self.bits, *self.bits_pattern.items())


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a base model on a device, and the room it has for adapters.

    ``base``: a directory, a hub id, or ``package:module/subdir`` for a model inside an installed package.
    ``base_sha256``: expected digest of the base's ``model.safetensors``; the engine refuses to start on another.
    ``device``: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``….
    ``dtype``: of the base; ``auto`` keeps the checkpoint's own, which is also what lets CPU replicas on one node
    share the weights' memory pages. LoRA is computed in float32 whatever the base's dtype.
    ``adapter_memory_bytes``: device memory for resident adapters; each costs its own bytes.
    ``host_memory_bytes``: host memory for adapters that are ready but not on the device; 0 keeps none.
    ``loader_threads``: cold adapters that are checked and converted at once.
    ``store_dir``: where private copies of adapters live; None is a temporary directory, removed on ``close``.
    ``quantization``: of the base's linear layers as it is read; None serves the checkpoint as it is.
    """

    base: str
    device: str = "auto"
    dtype: str = "auto"
    base_sha256: str | None = None
    adapter_memory_bytes: int = 1 << 30
    host_memory_bytes: int = 1 << 30
    loader_threads: int = 2
    max_batch_rows: int = 64
    num_threads: int | None = None
    store_dir: Path | None = None
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.base:
            problems.append("base is empty")
        if self.dtype not in _DTYPES:
            problems.append(f"dtype {self.dtype!r} is none of {', '.join(_DTYPES)}")
        for name, low in (
            ("adapter_memory_bytes", 1),
            ("host_memory_bytes", 0),
            ("loader_threads", 1),
            ("max_batch_rows", 1),
        ):
            if getattr(self, name) < low:
                problems.append(f"{name} is {getattr(self, name)}, must be at least {low}")
        if self.num_threads is not None and self.num_threads < 1:
            problems.append(f"num_threads is {self.num_threads}, must be at least 1")
        if problems:
            raise ValueError("EngineConfig: " + "; ".join(problems))


@dataclass(frozen=True)
class RoutingConfig:
    """How the router forms batches and spreads them.

    ``max_batch_tokens``: of all rows of a batch, padding included. ``max_padding``: how much of a batch may be padding.
    ``batch_wait_s``: how long the oldest row may wait for company while a replica is free.
    ``calls_per_replica``: batches a replica may hold at once; 2 lets it tokenise one while it computes the other.
    ``cold_calls_per_replica``: calls at once that wait for an adapter to be loaded, each for another one; an
    application's routers share them.
    ``max_queued_rows``, ``max_queued_tokens``: of all tenants, on one router; one tenant may fill what is left of them
    to half. ``tenant_weights``: 1 for who is not named; twice the weight, twice the tokens while both wait.
    ``max_wait_s``: of one tenant and adapter, who has waited so long has every second turn, whatever its priority.
    ``timeout_s``: of a row that names none.
    ``load_slack``: a replica is passed over when it holds more than ``(1 + load_slack) * mean + max_batch_rows`` rows.
    ``copy_penalty``: how many times its load time a second copy of a resident adapter must save.
    ``patience``: a call that takes so many times as long as it should have, and ``min_patience_s``, is sent to another
    replica as well; ``retry_budget``: of all rows, how many may be sent again.
    ``warm_up_s``: how long a new replica may take to load what is asked for most, before it gets rows.
    """

    max_batch_rows: int = 32
    max_batch_tokens: int = 16_384
    max_padding: float = 0.25
    batch_wait_s: float = 0.002
    calls_per_replica: int = 2
    cold_calls_per_replica: int = 64
    max_queued_rows: int = 10_000
    max_queued_tokens: int = 4_000_000
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_wait_s: float = 2.0
    timeout_s: float = 60.0
    load_slack: float = 0.25
    copy_penalty: float = 4.0
    patience: float = 8.0
    min_patience_s: float = 1.0
    retry_budget: float = 0.1
    warm_up_s: float = 30.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, must be at least {low}"
            for name, low in (
                ("max_batch_rows", 1),
                ("max_batch_tokens", 1),
                ("max_padding", 0),
                ("batch_wait_s", 0),
                ("calls_per_replica", 1),
                ("cold_calls_per_replica", 1),
                ("max_queued_rows", 1),
                ("max_queued_tokens", 1),
                ("max_wait_s", 0),
                ("timeout_s", 0),
                ("load_slack", 0),
                ("copy_penalty", 1),
                ("patience", 1),
                ("min_patience_s", 0),
                ("retry_budget", 0),
                ("warm_up_s", 0),
            )
            if not getattr(self, name) >= low
        ]
        problems += [
            f"tenant_weights[{tenant!r:.80}] is {weight}, must be more than 0"
            for tenant, weight in self.tenant_weights.items()
            if not weight > 0
        ]
        object.__setattr__(self, "tenant_weights", dict(self.tenant_weights))  # nobody else's to change
        if problems:
            raise ValueError("RoutingConfig: " + "; ".join(problems))


@dataclass(frozen=True)
class SourceConfig:
    """Where adapters may be fetched from, and how patiently.

    ``allowed``: prefixes of addresses, compared part by part; an adapter that lies below none of them is refused.
    ``/srv/adapters`` and ``file:///srv/adapters`` mean the same. A host may have private addresses only where a prefix
    names it; ``http://`` is refused unless listed. ``timeout_s``: for all files of one adapter. ``idle_timeout_s``: for
    a connection, and between two parts of an answer. ``attempts``: how often in a row an address may fail without
    sending anything; the pauses between them begin at ``backoff_s`` and double. ``secrets_dir``: credentials by name, a
    file or a directory of files each.
    """

    allowed: Sequence[str] = ("file://", "package:", "hf://", "s3://", "gs://", "az://", "https://")
    timeout_s: float = 600.0
    idle_timeout_s: float = 20.0
    attempts: int = 4
    backoff_s: float = 0.5
    secrets_dir: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.allowed, str) or not all(isinstance(prefix, str) for prefix in self.allowed):
            problems.append(f"allowed is {self.allowed!r:.80}, must be a list of prefixes")
        else:
            object.__setattr__(self, "allowed", tuple(self.allowed))  # nobody else's to change
        for name in ("timeout_s", "idle_timeout_s", "attempts", "backoff_s"):
            value = getattr(self, name)
            if not value > 0:
                problems.append(f"{name} is {value}, must be more than 0")
        if problems:
            raise ValueError("SourceConfig: " + "; ".join(problems))


@dataclass(frozen=True)
class CatalogConfig:
    """What is registered, and where a node keeps its copies.

    ``url``: ``sqlite:///…`` or ``postgresql+psycopg://…``; None is a file of the application's own in ``store_dir``.
    ``store_bytes``: what the copies may take on disk, None for no limit; ``max_adapter_bytes``: what the weights of one
    adapter may have as a file. ``manifest``: a file that declares adapters.
    """

    store_dir: Path
    url: str | None = None
    store_bytes: int | None = None
    max_adapter_bytes: int = 4 * EngineConfig.adapter_memory_bytes
    sources: SourceConfig = field(default_factory=SourceConfig)
    manifest: Path | None = None

    def url_of(self, application: str) -> str:
        """Where the catalog of ``application`` is."""
        return self.url or f"sqlite:///{(self.store_dir / 'catalogs' / application).absolute()}.db"
