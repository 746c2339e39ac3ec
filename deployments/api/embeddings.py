"""``POST /v1/embeddings`` in OpenAI's shape; pooling and prefix are the adapter's own."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter
from pydantic import Field

from adapter_router.errors import InvalidRequest
from adapter_router.types import Embedding, Row, RowResult
from deployments.api.caller import CurrentCaller
from deployments.api.envelope import TextOrTokens, split_inputs
from deployments.api.fan_out import FanOutRequest, respond

routes = APIRouter()


class EmbeddingsRequest(FanOutRequest):
    """OpenAI's request; ``base64`` is of little-endian float32."""

    input: TextOrTokens
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool | None = None

    def rows(self) -> list[Row]:
        """One row for each input."""
        parameters = {
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
        }
        return [
            Row(inputs, self.adapter, "embedding", parameters, self.head, self.sticky_key)
            for inputs in split_inputs(self.input)
        ]


@routes.post("/v1/embeddings")
async def embeddings(request: EmbeddingsRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Embed every input with one adapter, or with each of several."""
    return await respond(caller, "embd", request, partial(_data, request.encoding_format))


def vector(result: RowResult) -> list[float] | list[list[float]]:
    """What a row of task ``embedding`` answered."""
    return cast(Embedding, result.output)["embedding"]


def _data(encoding_format: str, results: Sequence[RowResult]) -> list[dict[str, Any]]:
    vectors = [vector(result) for result in results]
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encoded(values) if encoding_format == "base64" else values,
        }
        for index, values in enumerate(vectors)
    ]


def _encoded(values: list[float] | list[list[float]]) -> str:
    array = np.asarray(values, dtype="<f4")
    if array.ndim != 1:  # the shape would be lost, and readers take what comes for one vector
        raise InvalidRequest("this adapter gives one vector a token; ask for encoding_format float", "encoding_format")
    return base64.b64encode(array.tobytes()).decode()
