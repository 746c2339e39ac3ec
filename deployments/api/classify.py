"""``POST /v1/classify`` in vLLM's shape; labels and their number are the adapter's own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from adapter_router.types import Row
from deployments.api.envelope import TextOrTokens, TextRequest, answer, envelope, indexed, split_inputs
from deployments.router import Router, current_router

routes = APIRouter()


class ClassifyRequest(TextRequest):
    """vLLM's request."""

    input: TextOrTokens
    use_activation: bool = True
    priority: int = 0

    def rows(self) -> list[Row]:
        """One row for each input."""
        parameters = {
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "use_activation": self.use_activation,
        }
        return [
            Row(inputs, self.adapter, "text-classification", parameters, self.head, self.sticky_key)
            for inputs in split_inputs(self.input)
        ]


@routes.post("/v1/classify")
@routes.post("/classify", include_in_schema=False)
async def classify(request: ClassifyRequest, router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """Label every input with one adapter."""
    results = await answer(router, request.rows())
    return envelope("classify", request, results, data=indexed(results))
