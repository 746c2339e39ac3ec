"""What crosses our boundaries: rows in, results out, and the adapter version that answers. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypedDict

import numpy.typing as npt

from adapter_router.errors import AdapterRouterError, InvalidRequest

TaskKind = Literal["text-classification"]
TASK_KINDS: tuple[TaskKind, ...] = ("text-classification",)

Activation = Literal["softmax", "sigmoid", "none"]
"""How logits become scores: one label of many, any number of labels, or regression."""

Array = npt.NDArray[Any]
Inputs = str | Mapping[str, Array]
"""Text, or the model's own features by name as 1-D arrays of one length (``input_ids``, ``attention_mask``…)."""


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: JSON lets halves of surrogate pairs through, nothing else does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Row:
    """One input for one adapter.

    ``adapter`` None means the bare base. ``task`` is only needed where it cannot be inferred.
    ``parameters``: ``truncate_prompt_tokens`` (int, -1 for the base's own limit) cuts a long text instead of
    refusing it; ``use_activation`` (bool, default True) False gives raw logits as ``probs``.
    """

    inputs: Inputs
    adapter: str | None = None
    task: TaskKind | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what could not even be looked at; values are checked where the row is encoded."""
        for name, kinds in (("inputs", (str, Mapping)), ("adapter", (str, NoneType)), ("parameters", (Mapping,))):
            if not isinstance(getattr(self, name), kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise InvalidRequest(
                    f"a row's {name} must be {expected}, not {type(getattr(self, name)).__name__}", name
                )


class Classification(TypedDict):
    """Answer of ``text-classification``; ``label`` and ``score`` belong to the highest of ``probs``."""

    label: str
    score: float
    probs: list[float]
    num_classes: int


@dataclass(frozen=True)
class RowResult:
    """One answered row.

    ``logits`` is the base architecture's raw output for this row under its adapter, unpadded: ``(labels,)`` for
    text classification. ``version`` names the adapter's exact content (``sha256:…``; the base's for a bare row).
    """

    output: Classification
    logits: Array
    adapter: str | None
    version: str
    num_tokens: int
    replica: str | None = None


RowOutcome = RowResult | AdapterRouterError
"""A row's answer, or the error that stands in its place."""


@dataclass(frozen=True)
class ShardReply:
    """A replica's answer to one shard: outcomes in the shard's order, and what ``replica`` holds now.

    ``load_s``: mean time the replica needs to load an adapter.
    """

    replica: str
    outcomes: list[RowOutcome]
    resident: frozenset[str]
    load_s: float


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of an adapter directory: ``adapter_config.json``, ``adapter_model.safetensors``, ``config.json``."""

    config: bytes
    weights: bytes
    head_config: bytes | None = None


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version of one adapter: all that a replica needs to read and serve it.

    ``digest`` is the content hash of ``directory``, a private copy that nobody else writes.
    """

    adapter: str
    digest: str
    directory: Path
    task: TaskKind
    labels: tuple[str, ...]
    activation: Activation


@dataclass(frozen=True)
class BaseInfo:
    """A base model as replicas serve it; ``labels`` None: it has no trained head of its own."""

    name: str
    fingerprint: str
    model_type: str
    labels: tuple[str, ...] | None
    max_tokens: int


@dataclass(frozen=True)
class LoadReport:
    """What a successful load did. ``num_bytes`` is what the adapter holds on its device."""

    version: AdapterVersion
    tensors_applied: int
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    num_bytes: int
    warnings: tuple[str, ...]
