"""``POST /v1/image-classify``: images as base64 in JSON, or one image as the body itself."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from adapter_router.errors import AdapterUnavailable, InvalidRequest
from adapter_router.types import AdapterVersion, Classification, Row, RowResult
from deployments.api.caller import Caller, CurrentCaller
from deployments.api.envelope import AdapterRequest, Text, envelope, indexed

routes = APIRouter()

MAX_BODY_BYTES = 20 << 20


class ImageOptions(AdapterRequest):
    """What is asked about an image; ``top_k`` adds the best labels by name."""

    use_activation: bool = True
    top_k: Annotated[int, Field(ge=1)] | None = None

    def row(self, image: bytes) -> Row:
        parameters = {"use_activation": self.use_activation}
        return Row(image, self.adapter, "image-classification", parameters, self.head, self.sticky_key)


class ImageClassifyRequest(ImageOptions):
    """Encoded images (PNG, JPEG…) in base64, or as ``data:`` URLs of it. Nothing is fetched from anywhere."""

    input: Text | Annotated[list[Text], Field(min_length=1)]

    def images(self) -> list[bytes]:
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [_decoded(text) for text in texts]


_BODIES = {
    "application/json": {"schema": ImageClassifyRequest.model_json_schema()},
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}


@routes.post("/v1/image-classify", openapi_extra={"requestBody": {"required": True, "content": _BODIES}})
async def image_classify(request: Request, caller: CurrentCaller) -> dict[str, Any]:
    """Label every image with one adapter. With an image as the body, options are query parameters."""
    options, images = await _read(request)
    results = await caller.answer([options.row(image) for image in images], options.priority)
    data = indexed(results)
    if options.top_k:
        for entry, best in zip(data, await _best(caller, options, results), strict=True):
            entry["top_k"] = best
    return envelope("image-classify", options, results, data=data)


async def _read(request: Request) -> tuple[ImageOptions, list[bytes]]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    # Megabytes of base64 would hold up everybody's requests.
    return await asyncio.to_thread(_parsed, kind, await _body(request), dict(request.query_params))


def _parsed(kind: str, body: bytes, query: dict[str, str]) -> tuple[ImageOptions, list[bytes]]:
    try:
        if kind == "application/json":
            request = ImageClassifyRequest.model_validate_json(body)
            return request, request.images()
        if kind.startswith("image/") or kind == "application/octet-stream":
            return ImageOptions.model_validate(query, strict=False), [body]
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error
    raise InvalidRequest(f"content-type {kind!r:.80} is not served; send application/json or image/*", "content-type")


async def _body(request: Request) -> bytes:
    """Raises InvalidRequest as soon as there is more of it than we read, and when there is none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer or smaller images")
    if not body:
        raise InvalidRequest("the body is empty; send JSON or an image")
    return bytes(body)


def _decoded(text: str) -> bytes:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InvalidRequest("a data URL must read data:TYPE;base64,…", "input")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"an image must be base64 or a data: URL of it ({error})", "input") from error


async def _best(caller: Caller, options: ImageOptions, results: Sequence[RowResult]) -> list[list[dict[str, Any]]]:
    """Of each result the ``top_k`` labels, best first."""
    row = options.row(b"")
    version, base = await caller.version_of(row), caller.router.base_of(row)
    labels = (
        {version.digest: version.labels} if isinstance(version, AdapterVersion) else {base.fingerprint: base.labels}
    )
    return [_ranked(result, labels.get(result.version), options.top_k) for result in results]


def _ranked(result: RowResult, labels: Sequence[str] | None, top_k: int | None) -> list[dict[str, Any]]:
    probs = cast(Classification, result.output)["probs"]
    if labels is None or len(labels) != len(probs):
        raise AdapterUnavailable(f"adapter {result.adapter!r} was replaced meanwhile; try again", "model")
    pairs = sorted(zip(labels, probs, strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "score": prob} for label, prob in pairs[:top_k]]
