"""``POST /v1/classify`` in vLLM's shape; labels and their number are the adapter's own."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from adapter_router.errors import AdapterRouterError
from adapter_router.types import Inputs, Row, RowResult
from deployments.router import Router, current_router

routes = APIRouter()

_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ClassifyRequest(BaseModel):
    """vLLM's request; ``model`` is an adapter's name, the base's, or absent for the base."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1)] | _Tokens | Annotated[list[_Tokens], Field(min_length=1)]
    truncate_prompt_tokens: int | None = None
    use_activation: bool = True
    user: str | None = None
    request_id: str | None = None
    priority: int = 0

    def rows(self) -> list[Row]:
        """One row for each input."""
        parameters = {
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "use_activation": self.use_activation,
        }
        return [Row(inputs, self.model or None, "text-classification", parameters) for inputs in self._inputs()]

    def _inputs(self) -> list[Inputs]:
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [{"input_ids": np.asarray(self.input)}]
        return [entry if isinstance(entry, str) else {"input_ids": np.asarray(entry)} for entry in self.input]


@routes.post("/v1/classify")
@routes.post("/classify", include_in_schema=False)
async def classify(request: ClassifyRequest, router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """Label every input with one adapter."""
    outcomes = await router.infer_many(request.rows())
    results = [_expect(outcome) for outcome in outcomes]
    tokens = sum(result.num_tokens for result in results)
    return {
        "id": f"classify-{request.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model,
        "data": [{"index": index, **result.output} for index, result in enumerate(results)],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
        "adapter": {
            "name": results[0].adapter,
            "version": results[0].version,
            "replicas": sorted({result.replica or "" for result in results}),
        },
    }


def _expect(outcome: RowResult | AdapterRouterError) -> RowResult:
    if isinstance(outcome, AdapterRouterError):
        raise outcome
    return outcome
