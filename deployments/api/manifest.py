"""``/v1/manifest``: what is declared against what is there."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict

from adapter_router.errors import InvalidRequest
from deployments.api import documents
from deployments.router import Router, current_router

routes = APIRouter()

_MOST_BYTES = 16 << 20


class ManifestQuery(BaseModel):
    """``dry_run``: only say what differs."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False


@routes.get("/v1/manifest")
async def drift(router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """How the catalog differs from what the application's configuration declares."""
    declared = router.declared
    found = await declared.reconcile(only_look=True) if declared.is_configured else []
    return {
        "object": "list",
        "configured": declared.is_configured,
        "error": declared.error,
        "data": [documents.difference(difference) for difference in found],
    }


@routes.post("/v1/manifest")
async def reconcile(
    request: Request, query: Annotated[ManifestQuery, Query()], router: Annotated[Router, Depends(current_router)]
) -> dict[str, Any]:
    """Bring the catalog in line with the manifest in the body (YAML), or with the configuration's when it is empty."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise InvalidRequest(f"the manifest has more than {_MOST_BYTES} bytes")
    try:
        text = body.decode() if body.strip() else None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the manifest is not UTF-8: {error}") from error
    found = await router.declared.reconcile(text, only_look=query.dry_run)
    return {
        "object": "list",
        "applied": not query.dry_run,
        "data": [documents.difference(difference) for difference in found],
    }
