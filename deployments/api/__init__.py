"""HTTP: one file per wire dialect, each of which only translates to rows and back."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapter_router.errors import AdapterRouterError, InvalidRequest
from deployments.api import adapters, classify, operation

# What the framework itself answers: status -> (type, code).
_HTTP_ERRORS = {
    400: ("BadRequestError", "invalid_request"),
    404: ("NotFoundError", "not_found"),
    405: ("MethodNotAllowedError", "method_not_allowed"),
}


def build_http() -> FastAPI:
    """The application that Serve mounts on the router."""
    http = FastAPI(title="adapter-router", docs_url="/docs", redoc_url=None)
    for dialect in (classify, adapters, operation):
        http.include_router(dialect.routes)
    http.add_exception_handler(AdapterRouterError, _on_error)
    http.add_exception_handler(RequestValidationError, _on_invalid_body)
    http.add_exception_handler(HTTPException, _on_http_error)
    return http


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterRouterError)
    headers = {"Retry-After": "1"} if error.retryable else None
    return JSONResponse(error.body(), error.status, headers)


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
    return JSONResponse(body, error.status_code, error.headers)
