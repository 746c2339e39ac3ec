"""Probes and metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from deployments.router import Router, current_router

routes = APIRouter()


@routes.get("/healthz")
async def healthz() -> PlainTextResponse:
    """This process answers."""
    return PlainTextResponse("ok")


@routes.get("/readyz")
async def readyz(router: Annotated[Router, Depends(current_router)]) -> JSONResponse:
    """A replica is there and the declared adapters have been tried; those that failed are named."""
    ready = await router.ready()
    failed = {name: error.body()["error"] for name, error in router.failures.items()}
    return JSONResponse({"ready": ready, "failed_adapters": failed}, 200 if ready else 503)


@routes.get("/metrics")
async def metrics(router: Annotated[Router, Depends(current_router)]) -> Response:
    """The whole application in Prometheus' text format."""
    return Response(await router.metrics_text(), media_type=CONTENT_TYPE_LATEST)
