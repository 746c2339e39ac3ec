"""What crosses our boundaries: rows in, results out, and the adapter version that answers. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NotRequired, TypedDict, get_args

import numpy.typing as npt

from adapter_router.errors import AdapterRouterError, InvalidRequest

TaskKind = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "embedding",
    "text-generation",
    "seq2seq-generation",
]
TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)

Activation = Literal["softmax", "sigmoid", "none"]
"""How logits become scores: one label of many, any number of labels, or regression."""

Array = npt.NDArray[Any]
Inputs = str | tuple[str, str] | bytes | Mapping[str, Array]
"""Text; a pair of texts (question and context, query and document); an encoded image; or the model's own features.

Features by name: 1-D arrays of one length (``input_ids``, ``attention_mask``…), ``pixel_values`` of (C, H, W).
"""

Pooling = Literal["mean", "cls", "last", "max", "none"]
"""How token vectors become one embedding; "none" keeps them all."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class EmbeddingSettings:
    """How one adapter embeds.

    ``normalize``: to length 1, after cutting to the first ``dimensions`` numbers. ``prefix`` goes before every text.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    dimensions: int | None = None
    prefix: str = ""


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

    ``adapter``: a name; names and weights of a mix, ``{"a": 0.7, "b": -0.3}``; None for the bare base. ``head`` names
    the adapter of a mix whose saved modules (classifier…), labels and settings answer; only needed where more than one
    could. ``task`` is only needed where it cannot be inferred. ``sticky_key``: rows with the same one get the same
    version of an adapter whose traffic is split between several; without it every row is a draw of its own.
    ``tenant``: who shares with whom; of those who wait each gets its share. ``priority``: of one tenant and adapter
    lower values go first. ``timeout_s``: seconds, from when the row is handed over, after which nobody waits for it.
    ``parameters``, each for the tasks it concerns:

    - texts: ``truncate_prompt_tokens`` (int, -1 for the base's own limit) cuts a long text instead of refusing it
    - classification: ``use_activation`` (bool, default True); False gives raw logits as ``probs``
    - token-classification: ``aggregation_strategy`` ("none", "simple", "first", "average", "max"; default "simple"),
      ``ignore_labels`` (default ["O"])
    - question-answering: ``top_k`` (default 1), ``max_answer_len`` (tokens, default 15),
      ``handle_impossible_answer`` (default False)
    - embedding: ``pooling``, ``normalize``, ``dimensions``, ``prefix`` override the adapter's EmbeddingSettings
    - generation: ``max_new_tokens`` (default 16)
    """

    inputs: Inputs
    adapter: str | Mapping[str, float] | None = None
    task: TaskKind | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    sticky_key: str | None = None
    tenant: str = ""
    priority: int = 0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what could not even be looked at; values are checked where the row is encoded."""
        kinds: tuple[tuple[str, tuple[type, ...]], ...] = (
            ("inputs", (str, tuple, bytes, Mapping)),
            ("adapter", (str, Mapping, NoneType)),
            ("parameters", (Mapping,)),
            ("head", (str, NoneType)),
            ("sticky_key", (str, NoneType)),
            ("tenant", (str,)),
            ("priority", (int,)),
            ("timeout_s", (int, float, NoneType)),
        )
        for name, allowed in kinds:
            if not isinstance(getattr(self, name), allowed):
                expected = " or ".join(kind.__name__ for kind in allowed)
                raise InvalidRequest(
                    f"a row's {name} must be {expected}, not {type(getattr(self, name)).__name__}", name
                )


class Classification(TypedDict):
    """Answer of text- and image-classification; ``label`` and ``score`` belong to the highest of ``probs``."""

    label: str
    score: float
    probs: list[float]
    num_classes: int


class Entity(TypedDict):
    """One labelled stretch of a text: characters ``start`` to ``end`` (None where features were sent, not a text).

    ``entity_group`` with an aggregation strategy; without one ``entity`` and ``index``, the token's position.
    """

    entity: NotRequired[str]
    entity_group: NotRequired[str]
    index: NotRequired[int]
    score: float
    word: str | None
    start: int | None
    end: int | None


class TokenClassification(TypedDict):
    """Answer of ``token-classification``."""

    entities: list[Entity]


class Answer(TypedDict):
    """A stretch of the context: characters ``start`` to ``end``; an empty ``answer`` where the context has none."""

    answer: str
    score: float
    start: int
    end: int


class QuestionAnswering(TypedDict):
    """Answer of ``question-answering``: best first; empty where features were sent, not texts."""

    answers: list[Answer]


class Embedding(TypedDict):
    """Answer of ``embedding``: one vector, or one a token with pooling "none"."""

    embedding: list[float] | list[list[float]]


class Scoring(TypedDict):
    """Answer of a generation task's scoring pass: log-probability of each token after the ones before it.

    The first is None for a causal model: nothing comes before it.
    """

    token_logprobs: list[float | None]


Output = Classification | TokenClassification | QuestionAnswering | Embedding | Scoring


@dataclass(frozen=True)
class RowResult:
    """One answered row.

    ``logits`` is the base architecture's raw output for this row under its adapter, unpadded: ``(labels,)``;
    ``(tokens, labels)`` for token classification; ``(tokens, 2)``, start and end, for question answering;
    ``(tokens, vocabulary)`` for generation tasks; ``(features,)`` for an embedding, ``(tokens, features)`` with
    pooling "none". ``adapter``: the name asked for, a mix spelled out. ``version`` names the adapter's exact content
    (``sha256:…``; the base's for a bare row); ``parts``: of a mix, name, version and weight of its adapters.
    """

    output: Output
    logits: Array
    adapter: str | None
    version: str
    num_tokens: int
    replica: str | None = None
    parts: tuple[tuple[str, str, float], ...] = ()


RowOutcome = RowResult | AdapterRouterError
"""A row's answer, or the error that stands in its place."""


@dataclass(frozen=True)
class ResidencyChange:
    """News of what a replica holds, by digest, up to its own ``revision``.

    Every digest that came or went since the revision asked for is ``added`` if it is there now, else ``removed``; one
    that came and went as well: a later reply may have been heard before. ``complete``: ``added`` is all that it holds.
    """

    revision: int
    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    complete: bool = False


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter in a replica's memory. ``idle_s``: seconds since its last use; ``leases``: batches that use it now."""

    digest: str
    tier: Literal["device", "host"]
    num_bytes: int
    pinned: bool
    leases: int
    idle_s: float


@dataclass(frozen=True)
class Capacity:
    """How much of a replica's memory for adapters is taken, in bytes."""

    device_bytes: int
    device_used: int
    host_bytes: int
    host_used: int
    pinned: int


@dataclass(frozen=True)
class ReplicaLoad:
    """How busy a replica is, whoever sends it rows.

    ``rows``: those it has taken and not answered yet. ``load_s``: mean time it needs to load an adapter.
    ``loading_fraction``: of the last seconds, the part in which it was loading any. ``evictions_s``: a second.
    ``used_bytes`` of ``capacity_bytes``: of its device's memory for adapters.
    """

    rows: int = 0
    load_s: float = 0.05
    loading_fraction: float = 0.0
    evictions_s: float = 0.0
    used_bytes: int = 0
    capacity_bytes: int = 0


@dataclass(frozen=True)
class ShardReply:
    """A replica's answer to one shard: outcomes in the shard's order, and what has changed in ``replica`` since."""

    replica: str
    outcomes: list[RowOutcome]
    residency: ResidencyChange
    load: ReplicaLoad = ReplicaLoad()


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of an adapter directory.

    ``adapter_config.json``, ``adapter_model.safetensors``; where there are: ``config.json`` (label names),
    ``adapter_router.json`` (what no PEFT file says) and ``initial/adapter_model.safetensors`` (the adapter before
    training, for initialisations that change the base).
    """

    config: bytes
    weights: bytes
    head_config: bytes | None = None
    manifest: bytes | None = None
    initial_weights: bytes | None = None


@dataclass(frozen=True)
class Source:
    """Where an adapter's files come from.

    ``uri``: ``file://``, ``hf://``, ``s3://``, ``gs://``, ``az://``, ``https://``, a plain path or ``package:…``.
    ``revision``: branch, tag or commit where the place has them. ``sha256``: what must be found there, a version's
    digest (``sha256:…``), or 64 hexadecimal digits of ``adapter_model.safetensors`` alone. ``secret_ref``: the name of
    the credentials to use, never the credentials.
    """

    uri: str
    revision: str | None = None
    sha256: str | None = None
    secret_ref: str | None = None


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version of one adapter: all that a replica needs to read and serve it.

    ``digest`` is the content hash of its files, of which ``directory`` was a private copy on the node that admitted it;
    a node without one fetches them from ``source``. A mix has ``parts`` and no directory; its digest follows from
    theirs, the weights and the head. ``brings_head``: the task's head is its own, not the base's. ``num_bytes``: what
    it holds on a device, at most. ``base``: fingerprint of the base it was checked against.
    """

    adapter: str
    digest: str
    directory: Path | None
    task: TaskKind
    labels: tuple[str, ...]
    activation: Activation
    embedding: EmbeddingSettings = EmbeddingSettings()
    brings_head: bool = False
    num_bytes: int = 0
    parts: tuple[MixPart, ...] = ()
    source: Source | None = None
    base: str = ""


@dataclass(frozen=True)
class MixPart:
    """One adapter of a mix, and what its changes are multiplied by."""

    version: AdapterVersion
    weight: float
    is_head: bool


@dataclass(frozen=True)
class BaseInfo:
    """A base model as replicas serve it.

    ``tasks``: what adapters on it may do. ``labels``: of its own trained head, None when it has none.
    """

    name: str
    fingerprint: str
    model_type: str
    tasks: tuple[TaskKind, ...]
    labels: tuple[str, ...] | None
    max_tokens: int


@dataclass(frozen=True)
class LoadReport:
    """What a successful load did.

    ``num_bytes`` is what the adapter holds on its device. ``norms``: of the change at each module, the Frobenius norm
    of the weight difference (of what is replaced, for a saved module), so that 0 means no effect there.
    """

    version: AdapterVersion
    tensors_applied: int
    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    num_bytes: int
    norms: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class GenerationEvent:
    """One finished row of ``generate``: ``index`` in the rows given.

    ``finish_reason``: "stop" at an end token (which is not part of ``token_ids``), "length" at max_new_tokens.
    ``error`` stands in place of everything else when the row failed.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    adapter: str | None = None
    version: str | None = None
    error: AdapterRouterError | None = None
