"""``POST /v1/token-classify``: the entities of each text, in the words of transformers' pipeline."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from adapter_router.types import Row
from deployments.api.caller import CurrentCaller
from deployments.api.envelope import Texts, indexed
from deployments.api.fan_out import FanOutRequest, respond

routes = APIRouter()

AggregationStrategy = Literal["none", "simple", "first", "average", "max"]


class TokenClassifyRequest(FanOutRequest):
    """One text or several, and how tokens become entities."""

    input: str | Texts
    aggregation_strategy: AggregationStrategy = "simple"
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
async def token_classify(request: TokenClassifyRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Find the entities of every text with one adapter, or with each of several."""
    return await respond(caller, "token-classify", request, indexed)
