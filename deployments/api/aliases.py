"""``/v1/aliases``: what names mean, in shares, changed in one step and taken back in one call."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Response
from pydantic import Field

from adapter_router.catalog.records import Alias
from adapter_router.errors import InvalidRequest
from deployments.api import documents
from deployments.api.pages import PageQuery, page
from deployments.api.paths import Name, refuse_action
from deployments.router import Router, current_router

routes = APIRouter()

CurrentRouter = Annotated[Router, Depends(current_router)]
Weights = Annotated[dict[str, Annotated[int, Field(strict=True)]], Body(min_length=1)]


@routes.get("/v1/aliases")
async def list_aliases(query: Annotated[PageQuery, Query()], router: CurrentRouter) -> dict[str, Any]:
    """All names and what they mean; every adapter's own is one."""
    adapters = router.adapters
    aliases = await adapters.registrar.read(adapters.catalog.aliases, query.after, query.limit + 1)
    return page([documents.alias(alias) for alias in aliases], query.limit, "name")


@routes.post("/v1/aliases/{name:path}/rollback")
async def rollback(name: Name, router: CurrentRouter, response: Response) -> dict[str, Any]:
    """Let a name mean what it did before its last change; twice goes back two changes."""
    return _answer(await router.adapters.rollback(name), response)


@routes.get("/v1/aliases/{name:path}")
async def get_alias(name: Name, router: CurrentRouter, response: Response) -> dict[str, Any]:
    """What a name means."""
    refuse_action(name)
    return _answer(await router.adapters.registrar.read(router.adapters.catalog.alias, name), response)


@routes.put("/v1/aliases/{name:path}")
async def put_alias(
    name: Name,
    weights: Weights,
    router: CurrentRouter,
    response: Response,
    if_match: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Let a name mean versions in shares, ``{"v1": 90, "v2": 10}``; with ``If-Match`` only if nobody was faster."""
    refuse_action(name)
    return _answer(await router.adapters.set_alias(name, weights, _revision(if_match)), response)


@routes.delete("/v1/aliases/{name:path}")
async def delete_alias(name: Name, router: CurrentRouter) -> dict[str, Any]:
    """Forget an alias; an adapter's own name goes with the adapter."""
    refuse_action(name)
    await router.adapters.registrar.write(router.adapters.catalog.remove_alias, name)
    return {"name": name, "removed": True}


def _answer(alias: Alias, response: Response) -> dict[str, Any]:
    response.headers["ETag"] = f'"{alias.revision}"'
    return documents.alias(alias)


def _revision(if_match: str | None) -> int | None:
    """Of the alias as the caller saw it: the ``ETag`` it got, or the number alone."""
    if if_match is None:
        return None
    digits = if_match.strip().removeprefix('"').removesuffix('"')
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise InvalidRequest(f"If-Match is {if_match!r:.80}, must be the revision of the alias", "If-Match")
    return int(digits)
