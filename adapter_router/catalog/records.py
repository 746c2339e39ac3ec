"""What the catalog keeps, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from adapter_router.types import AdapterVersion, Source, TaskKind

Phase = Literal["Registered", "Fetching", "Validating", "Ready", "Failed", "Retired"]
"""Where a registration is: known; its files on their way; checked against the base; servable; refused; taken back."""
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as somebody declares it: where it lies and what its files do not tell.

    ``base`` is a base's name or fingerprint; None: the one it fits. ``pinned``: never evicted from a device.
    ``preload``: on every replica before that one is ready. ``lazy``: not even fetched before its first row.
    """

    name: str
    source: Source
    base: str | None = None
    task: TaskKind | None = None
    labels: tuple[str, ...] | None = None
    pinned: bool = False
    preload: bool = False
    lazy: bool = False


@dataclass(frozen=True)
class Registration:
    """An adapter the catalog knows. Times are seconds since the epoch.

    ``reason`` and ``problems``: why it is Failed, or failed before the attempt that is under way; ``code`` and
    ``retryable`` of that error; ``retry_at``: when it is tried again by itself. ``managed``: a manifest declares it.
    ``began``: the revision that registered it, or registered it anew.
    """

    spec: AdapterSpec
    phase: Phase
    created: float
    updated: float
    attempts: int = 0
    reason: str | None = None
    problems: tuple[str, ...] = ()
    code: str | None = None
    retryable: bool = False
    retry_at: float | None = None
    managed: bool = False
    began: int = field(default=0, compare=False)


@dataclass(frozen=True)
class VersionRecord:
    """The ``number``-th version of an adapter (from 1).

    Its content, base, task and labels never change; ``retired`` does, and its source when the same was found elsewhere.
    """

    number: int
    version: AdapterVersion
    created: float
    retired: float | None = None


@dataclass(frozen=True)
class Total:
    """Of one base: adapters with unretired versions for it, those versions, and their bytes on a device."""

    adapters: int
    versions: int
    num_bytes: int


@dataclass(frozen=True)
class Target:
    """A version an alias leads to, and its share of the rows: ``weight`` of the sum of all weights."""

    adapter: str
    number: int
    weight: int


@dataclass(frozen=True)
class Alias:
    """A name and what it means. Every adapter's own name is one. ``revision`` is that of its last change."""

    name: str
    targets: tuple[Target, ...]
    revision: int
    updated: float


@dataclass(frozen=True)
class Event:
    """One thing that happened to a name, in the order of ``revision``."""

    revision: int
    at: float
    name: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Route:
    """What a name means: an adapter's, an alias', or one that addresses a version.

    ``choices``: versions and their weights, none of them 0; empty for an adapter that has no version yet or was taken
    back. ``registration``: of the adapter; None for an alias that is no adapter's own name.
    """

    name: str
    choices: tuple[tuple[AdapterVersion, int], ...]
    registration: Registration | None = None
