"""Values of the catalog as the text its tables hold, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from adapter_router.catalog.records import AdapterSpec, Registration
from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion, EmbeddingSettings, Source

_FLAGS = ("pinned", "preload", "lazy")  # columns of their own


def spec_text(spec: AdapterSpec) -> str:
    """``spec`` but for its name and flags."""
    return json.dumps({"source": asdict(spec.source), "base": spec.base, "task": spec.task, "labels": spec.labels})


def failure_text(error: AdapterRouterError | None) -> str | None:
    """What is kept of an error."""
    if error is None:
        return None
    values = {"reason": error.message, "problems": error.problems, "code": error.code, "retryable": error.retryable}
    return json.dumps(values)


def version_text(version: AdapterVersion) -> str:
    """``version`` but for its adapter's name and its digest."""
    values = asdict(version)
    directory = version.directory
    return json.dumps(
        {key: value for key, value in values.items() if key not in ("adapter", "digest", "parts")}
        | {"directory": None if directory is None else str(directory)}
    )


def identity(version: AdapterVersion) -> str:
    """Of what makes a version of an adapter another: content, base, task and labels."""
    parts = [version.digest, version.base, version.task, version.labels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def registration_of(row: Row[Any]) -> Registration:
    """A row of ``adapters``."""
    values = json.loads(row.spec)
    flags = {name: bool(getattr(row, name)) for name in _FLAGS}
    source, labels = Source(**values["source"]), values["labels"]
    spec = AdapterSpec(
        row.name, source, values["base"], values["task"], None if labels is None else tuple(labels), **flags
    )
    failure: Mapping[str, Any] = json.loads(row.failure) if row.failure is not None else {}
    return Registration(
        spec=spec,
        phase=row.phase,
        created=row.created,
        updated=row.updated,
        attempts=row.attempts,
        reason=failure.get("reason"),
        problems=tuple(failure.get("problems", ())),
        code=failure.get("code"),
        retryable=failure.get("retryable", False),
        retry_at=row.retry_at,
        managed=bool(row.managed),
        began=row.began,
    )


def version_of(adapter: str, digest: str, body: str) -> AdapterVersion:
    """The version kept as ``body``."""
    values = json.loads(body)
    directory, source = values.pop("directory"), values.pop("source")
    labels, embedding = values.pop("labels"), values.pop("embedding")
    return AdapterVersion(
        adapter,
        digest,
        None if directory is None else Path(directory),
        labels=tuple(labels),
        embedding=EmbeddingSettings(**embedding),
        source=None if source is None else Source(**source),
        **values,
    )
