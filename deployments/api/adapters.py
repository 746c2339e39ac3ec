"""``/v1/adapters``: registering, watching, changing and removing adapters; docs/adapters.md tells the story."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from adapter_router.catalog.records import AdapterSpec, Phase, Registration
from adapter_router.errors import AdapterNotFound, InvalidRequest
from adapter_router.types import Source, TaskKind
from deployments.api import documents, residency
from deployments.api.pages import EventsQuery, PageQuery, page
from deployments.api.paths import Name, Number, refuse_action
from deployments.router import Router, current_router

routes = APIRouter()

CurrentRouter = Annotated[Router, Depends(current_router)]

_Text = Annotated[str, Field(min_length=1)]
_Seconds = Annotated[float, Field(gt=0, le=3600)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RegisterRequest(_Body):
    """An adapter, as in a manifest. ``wait``: answer once it is Ready or Failed, or ``wait_s`` have passed."""

    name: _Text
    uri: _Text
    base: str | None = None
    task: TaskKind | None = None
    labels: list[str] | None = None
    pinned: bool = False
    preload: bool = False
    lazy: bool = False
    revision: str | None = None
    sha256: str | None = None
    secret_ref: Annotated[str | None, Field(alias="secretRef")] = None
    replace: bool = False
    wait: bool = False
    wait_s: _Seconds = 600.0

    def spec(self) -> AdapterSpec:
        """As the catalog knows it."""
        return AdapterSpec(
            name=self.name,
            source=Source(self.uri, self.revision, self.sha256, self.secret_ref),
            base=self.base,
            task=self.task,
            labels=None if self.labels is None else tuple(self.labels),
            pinned=self.pinned,
            preload=self.preload,
            lazy=self.lazy,
        )


class RetryRequest(_Body):
    """See ``RegisterRequest``."""

    wait: bool = False
    wait_s: _Seconds = 600.0


class RefreshRequest(_Body):
    """``activate``: what is found is meant by the name from now on."""

    activate: bool = True


class AdaptersQuery(PageQuery):
    """``phase`` chooses registrations; ``view=residency`` lists what replicas hold instead."""

    phase: Phase | None = None
    view: Literal["residency"] | None = None


@routes.post("/v1/adapters")
async def register(request: RegisterRequest, router: CurrentRouter, response: Response) -> dict[str, Any]:
    """Register an adapter: 202 while it is fetched and checked, 201 once it is Ready, 422 or 424 when it Failed."""
    registration = await router.adapters.register(request.spec(), replace=request.replace)
    registration = await _awaited(router, registration, request.wait_s if request.wait else None)
    response.status_code = 201 if registration.phase == "Ready" else 202
    response.headers["Location"] = "/v1/adapters/" + quote(request.name, safe="/")
    return await documents.registration(router, registration)


@routes.get("/v1/adapters")
async def list_adapters(query: Annotated[AdaptersQuery, Query()], router: CurrentRouter) -> dict[str, Any]:
    """Registrations by name, or what replicas hold."""
    if query.view == "residency":
        if query.phase is not None:
            raise InvalidRequest("phase chooses registrations, which the residency view does not list", "phase")
        return await residency.held(router.adapters, query)
    adapters = router.adapters
    found = await adapters.registrar.read(adapters.catalog.registrations, query.after, query.limit + 1, query.phase)
    return page(await documents.registrations(router, found), query.limit, "name")


@routes.get("/v1/events")
async def list_events(query: Annotated[EventsQuery, Query()], router: CurrentRouter) -> dict[str, Any]:
    """What happened to any name. ``revision``: where the log ends."""
    return await _events(router, None, query)


@routes.get("/v1/adapters/{name:path}/events")
async def list_adapter_events(
    name: Name, query: Annotated[EventsQuery, Query()], router: CurrentRouter
) -> dict[str, Any]:
    """What happened to one name; also to one that is removed."""
    return await _events(router, name, query)


@routes.get("/v1/adapters/{name:path}/versions")
async def list_versions(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """All versions of an adapter."""
    return {"object": "list", "data": await documents.versions(router, name)}


@routes.post("/v1/adapters/{name:path}/versions")
async def refresh(
    name: Name, router: CurrentRouter, response: Response, request: RefreshRequest | None = None
) -> dict[str, Any]:
    """Look at the source again: 201 with what lies there now, 200 where that version is known already."""
    known = {entry["number"] for entry in await documents.versions(router, name)}
    record = await router.adapters.refresh(name, activate=(request or RefreshRequest()).activate)
    is_new = record.number not in known
    response.status_code = 201 if is_new else 200
    return {**await _version(router, name, record.number), "new": is_new}


@routes.get("/v1/adapters/{name:path}/versions/{number:int}")
async def get_version(name: Name, number: Number, router: CurrentRouter) -> dict[str, Any]:
    """One version of an adapter."""
    return await _version(router, name, number)


@routes.delete("/v1/adapters/{name:path}/versions/{number:int}")
async def retire(name: Name, number: Number, router: CurrentRouter) -> dict[str, Any]:
    """Take a version back; refused while a name leads to it."""
    await router.adapters.retire(name, number)
    return {"name": name, "number": number, "retired": True}


@routes.post("/v1/adapters/{name:path}/warm")
async def warm(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """Load what a name means on every replica of its base."""
    loads = await router.adapters.warm(name)
    data = [{"replica": replica, "version": version.digest} for replica, version in loads]
    return {"object": "list", "name": name, "data": data}


@routes.put("/v1/adapters/{name:path}/pin")
async def pin(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """Load an adapter on every replica of its base, and never evict it."""
    return await documents.registration(router, await router.adapters.pin(name, True))


@routes.delete("/v1/adapters/{name:path}/pin")
async def unpin(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """Let an adapter be evicted again."""
    return await documents.registration(router, await router.adapters.pin(name, False))


@routes.post("/v1/adapters/{name:path}/retry")
async def retry(
    name: Name, router: CurrentRouter, response: Response, request: RetryRequest | None = None
) -> dict[str, Any]:
    """Fetch and check an adapter anew: 202 while that is done, 200 once it is Ready, 422 or 424 when it Failed."""
    asked = request or RetryRequest()
    registration = await router.adapters.retry(name)
    registration = await _awaited(router, registration, asked.wait_s if asked.wait else None)
    response.status_code = 200 if registration.phase == "Ready" else 202
    return await documents.registration(router, registration)


@routes.get("/v1/adapters/{name:path}")
async def get_adapter(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """One registration."""
    refuse_action(name)
    adapters = router.adapters
    return await documents.registration(router, await adapters.registrar.read(adapters.catalog.registration, name))


@routes.delete("/v1/adapters/{name:path}")
async def remove(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """Forget an adapter and all its versions; rows already accepted finish."""
    refuse_action(name)
    versions = await router.adapters.remove(name)
    return {"name": name, "removed": True, "versions": [version.digest for version in versions]}


async def _awaited(router: Router, registration: Registration, wait_s: float | None) -> Registration:
    """The registration after ``wait_s``, or sooner if it is Ready. Raises why it Failed."""
    if wait_s is None:
        return registration
    registration = await router.adapters.settled(registration.spec.name, wait_s)
    if registration.phase == "Failed":
        raise documents.failure(registration)
    return registration


async def _version(router: Router, name: str, number: int) -> dict[str, Any]:
    for entry in await documents.versions(router, name):
        if entry["number"] == number:
            return entry
    raise AdapterNotFound(f"adapter {name!r} has no version v{number}", "version")


async def _events(router: Router, name: str | None, query: EventsQuery) -> dict[str, Any]:
    adapters = router.adapters
    revision = await adapters.registrar.read(adapters.catalog.revision)
    found = await adapters.registrar.read(adapters.catalog.events, name, query.after, query.limit + 1)
    return {**page([documents.event(event) for event in found], query.limit, "revision"), "revision": revision}
