"""HTTP: one file per wire dialect, each of which only translates to rows and back."""

from __future__ import annotations

import json
import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapter_router.errors import AdapterRouterError, InternalError, InvalidRequest, Overloaded
from deployments.api import (
    adapters,
    aliases,
    classify,
    classify_multi,
    embeddings,
    image_classify,
    lora,
    manifest,
    models,
    operation,
    question_answer,
    residency,
    score,
    token_classify,
)

logger = logging.getLogger(__name__)

_DIALECTS = (
    classify,
    classify_multi,
    token_classify,
    image_classify,
    question_answer,
    embeddings,
    score,
    operation,
)
_ADMIN = (models, lora, adapters, aliases, residency, manifest)

_LONGEST_RETRY_S = 3600.0

# What the framework itself answers: status -> (type, code).
_HTTP_ERRORS = {
    400: ("BadRequestError", "invalid_request"),
    404: ("NotFoundError", "not_found"),
    405: ("MethodNotAllowedError", "method_not_allowed"),
}


def build_http() -> FastAPI:
    """The application that Serve mounts on the router."""
    http = FastAPI(title="adapter-router", redoc_url=None, default_response_class=AsciiJSONResponse)
    for dialect in (*_DIALECTS, *_ADMIN):
        http.include_router(dialect.routes)
    http.add_exception_handler(AdapterRouterError, _on_error)
    http.add_exception_handler(RequestValidationError, _on_invalid_body)
    http.add_exception_handler(HTTPException, _on_http_error)
    http.add_exception_handler(Exception, _on_fault)
    return http


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: whatever text was let in, an answer that names it can be written."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _on_error(request, InternalError("the server failed on this request"))


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterRouterError)
    headers = {"Retry-After": str(_retry_after(error))} if error.retryable else None
    return AsciiJSONResponse(error.body(), error.status, headers)


def _retry_after(error: AdapterRouterError) -> int:
    """Whole seconds: not before they have passed, and never for good."""
    seconds = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return max(1, math.ceil(min(seconds, _LONGEST_RETRY_S)))


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """Every fault of a malformed body at once, in our own shape."""
    assert isinstance(error, RequestValidationError)
    places = [".".join(str(part) for part in fault["loc"][1:]) for fault in error.errors()]
    problems = [f"{place}: {fault['msg']}" for place, fault in zip(places, error.errors(), strict=True)]
    return await _on_error(request, InvalidRequest("the request is malformed", places[0] or None, problems))


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind, code = _HTTP_ERRORS.get(error.status_code, ("HTTPError", "http_error"))
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": code}}
    return AsciiJSONResponse(body, error.status_code, error.headers)
