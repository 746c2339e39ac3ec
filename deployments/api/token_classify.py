"""``POST /v1/token-classify``: the entities of each text, in the words of transformers' pipeline."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from adapter_router.types import Row
from deployments.api.envelope import TextRequest, Texts, answer, envelope, indexed
from deployments.router import Router, current_router

routes = APIRouter()


class TokenClassifyRequest(TextRequest):
    """One text or several, and how tokens become entities."""

    input: str | Texts
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: list[str] = Field(default=["O"])

    def rows(self) -> list[Row]:
        """One row for each text."""
        parameters = {
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "aggregation_strategy": self.aggregation_strategy,
            "ignore_labels": self.ignore_labels,
        }
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [
            Row(text, self.adapter, "token-classification", parameters, self.head, self.sticky_key) for text in texts
        ]


@routes.post("/v1/token-classify")
async def token_classify(
    request: TokenClassifyRequest, router: Annotated[Router, Depends(current_router)]
) -> dict[str, Any]:
    """Find the entities of every text with one adapter."""
    results = await answer(router, request.rows())
    return envelope("token-classify", request, results, data=indexed(results))
