"""Probes and metrics."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from adapter_router.errors import CatalogUnavailable
from deployments.api import documents
from deployments.router import Router, current_router

routes = APIRouter()

_MOST_NAMED = 100


@routes.get("/healthz")
async def healthz() -> PlainTextResponse:
    """This process answers."""
    return PlainTextResponse("ok")


@routes.get("/readyz")
async def readyz(router: Annotated[Router, Depends(current_router)], response: Response) -> dict[str, Any]:
    """Rows can be answered on every base. Declared adapters that cannot be served are named, 100 of them at most.

    What else is wrong is said, too: a manifest that is not followed, a catalog that does not answer (names that are in
    memory are served all the same).
    """
    ready = await router.ready()
    response.status_code = 200 if ready else 503
    answer: dict[str, Any] = {"ready": ready, "failed_adapters": {}}
    adapters = router.adapters
    try:
        failed = await adapters.registrar.read(adapters.catalog.failed_declared, _MOST_NAMED)
        answer["failed_adapters"] = {found.spec.name: documents.reasons(found) for found in failed}
    except CatalogUnavailable as error:
        answer["catalog_error"] = str(error)
    if router.declared.error is not None:
        answer["manifest_error"] = router.declared.error
    return answer


@routes.get("/metrics")
async def metrics(router: Annotated[Router, Depends(current_router)]) -> Response:
    """The whole application in Prometheus' text format."""
    return Response(await router.metrics_text(), media_type=CONTENT_TYPE_LATEST)
