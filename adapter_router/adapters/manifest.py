"""An adapter directory's optional ``adapter_router.json``: what serving needs and no PEFT file says.

    {"task": "embedding", "pooling": "mean", "normalize": true, "dimensions": 256, "prefix": "query: ",
     "base_fingerprint": "sha256:…"}

Every field may be absent. Unknown fields are refused: a misspelt one would otherwise be ignored in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from adapter_router.adapters.strict_json import parse_object
from adapter_router.types import POOLINGS, TASK_KINDS, EmbeddingSettings, TaskKind, is_unicode

_FIELDS = ("task", "pooling", "normalize", "dimensions", "prefix", "base_fingerprint")
_MAX_PREFIX = 1000


@dataclass(frozen=True)
class Manifest:
    """``embedding`` None: the file says nothing about it."""

    task: TaskKind | None = None
    embedding: EmbeddingSettings | None = None
    base_fingerprint: str | None = None


def parse_manifest(raw: bytes | None) -> tuple[Manifest, list[str]]:
    """The manifest and every problem with it; an absent file is an empty manifest."""
    if raw is None:
        return Manifest(), []
    document, problems = parse_object(raw, "adapter_router.json")
    if document is None:
        return Manifest(), problems
    problems += [
        f"adapter_router.json: unknown field {name!r:.80}; known are {', '.join(_FIELDS)}"
        for name in document
        if name not in _FIELDS
    ]
    problems += [f"adapter_router.json: {fault}" for fault in _faults(document)]
    if problems:
        return Manifest(), problems
    settings = {name: document[name] for name in ("pooling", "normalize", "dimensions", "prefix") if name in document}
    embedding = EmbeddingSettings(**settings) if settings else None
    return Manifest(cast(TaskKind | None, document.get("task")), embedding, document.get("base_fingerprint")), []


def _faults(document: dict[str, Any]) -> list[str]:
    def given(name: str) -> bool:
        return document.get(name) is not None

    faults = []
    if given("task") and document["task"] not in TASK_KINDS:
        faults.append(f"task is {document['task']!r:.80}, must be one of {', '.join(TASK_KINDS)}")
    if "pooling" in document and document["pooling"] not in POOLINGS:
        faults.append(f"pooling is {document['pooling']!r:.80}, must be one of {', '.join(POOLINGS)}")
    if "normalize" in document and not isinstance(document["normalize"], bool):
        faults.append(f"normalize is {document['normalize']!r:.80}, must be true or false")
    dimensions = document.get("dimensions")
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1):
        faults.append(f"dimensions is {dimensions!r:.80}, must be a positive integer")
    prefix = document.get("prefix", "")
    if not isinstance(prefix, str) or len(prefix) > _MAX_PREFIX or not is_unicode(prefix):
        faults.append(f"prefix must be a text of at most {_MAX_PREFIX} characters")
    if given("base_fingerprint") and not isinstance(document["base_fingerprint"], str):
        faults.append("base_fingerprint must be a text")
    return faults
