"""The catalog's values as JSON. Times are seconds since the epoch; a place is shown without credentials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adapter_router.catalog.differences import Difference
from adapter_router.catalog.overview import Meant
from adapter_router.catalog.records import Alias, Event, Registration, Target, VersionRecord
from adapter_router.catalog.sources.address import redacted
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterRouterError
from adapter_router.types import AdapterVersion
from deployments.router import Router


async def registrations(router: Router, found: Sequence[Registration]) -> list[dict[str, Any]]:
    """Registrations, and what their names mean now."""
    adapters = router.adapters
    meant = await adapters.registrar.read(adapters.catalog.meant, [entry.spec.name for entry in found])
    return [_registration(router, entry, meant.get(entry.spec.name, ())) for entry in found]


async def registration(router: Router, found: Registration) -> dict[str, Any]:
    """One registration, and what its name means now."""
    (document,) = await registrations(router, [found])
    return document


async def versions(router: Router, name: str) -> list[dict[str, Any]]:
    """All versions of an adapter; ``share`` is that of its own name's rows. Raises AdapterNotFound."""
    adapters = router.adapters
    records = await adapters.registrar.read(adapters.catalog.versions, name)
    meant = (await adapters.registrar.read(adapters.catalog.meant, [name])).get(name, ())
    total = sum(target.weight for target, _ in meant)
    shares = {target.number: target.weight / total for target, _ in meant if target.adapter == name}
    return [_version(router, record, shares.get(record.number, 0.0)) for record in records]


def alias(found: Alias) -> dict[str, Any]:
    """One alias."""
    return {**asdict(found), "targets": [asdict(target) for target in found.targets]}


def event(found: Event) -> dict[str, Any]:
    """One event; ``detail`` is an object."""
    detail = json.loads(found.detail)
    if isinstance(detail.get("uri"), str):
        detail["uri"] = redacted(detail["uri"])
    return {**asdict(found), "detail": detail}


def difference(found: Difference) -> dict[str, Any]:
    """One difference between what is declared and what is there."""
    fields = {
        field: {"registered": _shown(field, registered), "declared": _shown(field, declared)}
        for field, registered, declared in found.fields
    }
    return {"name": found.name, "kind": found.kind, "fields": fields, "reason": found.reason}


def base_name(router: Router, base: str | None) -> str | None:
    """A base's name where it is served here, else what is known of it."""
    pool = router.bases.named(base) if base else None
    return pool.base.name if pool else base


def failure(found: Registration) -> AdapterRouterError:
    """Why a registration failed, as the answer to whoever waits for it."""
    message = f"adapter {found.spec.name!r} failed: {found.reason}"
    kind = AdapterRejected if found.code == AdapterRejected.code else AdapterFailed
    return kind(message, None, found.problems)


def reasons(found: Registration) -> dict[str, Any] | None:
    """Why a registration failed; None when it has not."""
    if found.phase != "Failed":
        return None
    return {
        "message": found.reason,
        "code": found.code,
        "problems": list(found.problems),
        "retryable": found.retryable,
    }


def _shown(field: str, value: object) -> object:
    return redacted(value) if field == "uri" and isinstance(value, str) else value


def _registration(router: Router, found: Registration, meant: Meant) -> dict[str, Any]:
    spec = found.spec
    return {
        "name": spec.name,
        "phase": found.phase,
        "uri": redacted(spec.source.uri),
        "revision": spec.source.revision,
        "sha256": spec.source.sha256,
        "secretRef": spec.source.secret_ref,
        "base": spec.base,
        "task": spec.task,
        "labels": None if spec.labels is None else list(spec.labels),
        "pinned": spec.pinned,
        "preload": spec.preload,
        "lazy": spec.lazy,
        "managed": found.managed,
        "targets": [_target(router, target, version) for target, version in meant],
        "attempts": found.attempts,
        "retry_at": found.retry_at,
        "error": reasons(found),
        "created": found.created,
        "updated": found.updated,
    }


def _target(router: Router, target: Target, version: AdapterVersion) -> dict[str, Any]:
    """A version that a name means, and what it turned out to be."""
    return {
        **asdict(target),
        "version": version.digest,
        "base": base_name(router, version.base),
        "task": version.task,
        "num_labels": len(version.labels),
    }


def _version(router: Router, record: VersionRecord, share: float) -> dict[str, Any]:
    version = record.version
    return {
        "number": record.number,
        "version": version.digest,
        "share": share,
        "base": base_name(router, version.base),
        "base_fingerprint": version.base,
        "task": version.task,
        "labels": list(version.labels),
        "num_labels": len(version.labels),
        "num_bytes": version.num_bytes,
        "uri": redacted(version.source.uri) if version.source else None,
        "revision": version.source.revision if version.source else None,
        "created": record.created,
        "retired": record.retired,
    }
