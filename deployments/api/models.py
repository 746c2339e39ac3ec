"""``GET /v1/models`` in OpenAI's shape, a page at a time: all bases, then every name that rows can use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from adapter_router.catalog.addressing import address_of, not_found
from adapter_router.catalog.overview import Meant
from adapter_router.catalog.records import Registration, Target
from adapter_router.errors import AdapterNotFound
from adapter_router.types import BaseInfo
from deployments.api.documents import base_name
from deployments.api.pages import PageQuery, page
from deployments.api.paths import Name
from deployments.router import Router, current_router

routes = APIRouter()

_COMMON = {"object": "model", "owned_by": "adapter-router"}


@routes.get("/v1/models")
async def models(
    query: Annotated[PageQuery, Query()], router: Annotated[Router, Depends(current_router)]
) -> dict[str, Any]:
    """A page costs what it shows, however many adapters are registered."""
    bases = [pool.base for pool in router.bases]
    names = [base.name for base in bases]
    after_base = query.after in names
    passed = names.index(query.after) + 1 if query.after in names else len(names) if query.after else 0
    entries = [_base(base) for base in bases[passed:]]
    room = query.limit + 1 - len(entries)
    if room > 0:
        read, catalog = router.adapters.registrar.read, router.adapters.catalog
        found = await read(catalog.names, None if after_base else query.after, room)
        entries += [_entry(router, *named) for named in found]
    return page(entries, query.limit, "id")


@routes.get("/v1/models/{name:path}")
async def model(name: Name, router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """One base, adapter, alias or ``name@version``."""
    if pool := router.bases.named(name):
        return _base(pool.base)
    read, catalog = router.adapters.registrar.read, router.adapters.catalog
    _, found = await read(catalog.routes_at, [name])
    route = found[name]
    if isinstance(route, AdapterNotFound):
        raise route
    address = address_of(name)
    if address is None or not address.is_version:
        meant = (await read(catalog.meant, [name])).get(name, ())
        if route.registration is None and not meant:  # removed between the two looks
            raise not_found(name)
        return _entry(router, name, route.registration, meant)
    ((version, _),) = route.choices
    alike = (await read(catalog.numbers, [version.digest])).get(version.digest, ())
    number = address.number or max((number for adapter, number in alike if adapter == address.adapter), default=None)
    if number is None:
        raise not_found(name)
    target = Target(address.adapter, number, 1)
    return _entry(router, name, route.registration, ((target, version),))


def _base(base: BaseInfo) -> dict[str, Any]:
    labels = None if base.labels is None else list(base.labels)
    return {
        "id": base.name,
        **_COMMON,
        "created": 0,
        "root": base.name,
        "parent": None,
        "max_model_len": base.max_tokens,
        "metadata": {"tasks": list(base.tasks), "labels": labels, "version": base.fingerprint},
    }


def _entry(router: Router, name: str, registration: Registration | None, meant: Meant) -> dict[str, Any]:
    """One name. Of several versions the metadata are those of the one with the largest share, and name them all."""
    target, version = max(meant, key=lambda pair: pair[0].weight, default=(None, None))
    known = version or (registration.spec if registration else None)  # else nothing is, but what was declared
    assert known is not None
    labels = list(known.labels or ())
    versions = [
        {"adapter": t.adapter, "version_number": t.number, "version": v.digest, "weight": t.weight} for t, v in meant
    ]
    metadata = {
        "task": known.task,
        "num_labels": len(labels),
        "labels": labels,
        "version": version.digest if version else None,
        "version_number": target.number if target else None,
        "phase": registration.phase if registration else "Ready",
        **({"versions": versions} if len(versions) > 1 or not registration else {}),
    }
    return {
        "id": name,
        **_COMMON,
        "created": int(registration.created) if registration else 0,
        "root": None,  # where files lie is no caller's business; /v1/adapters says it
        "parent": base_name(router, known.base),
        "metadata": metadata,
    }
