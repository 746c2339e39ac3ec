"""``POST /v1/classify`` in vLLM's shape; labels and their number are the adapter's own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from adapter_router.types import Row
from deployments.api.caller import CurrentCaller
from deployments.api.envelope import TextOrTokens, indexed, split_inputs
from deployments.api.fan_out import FanOutRequest, respond

routes = APIRouter()


class ClassifyRequest(FanOutRequest):
    """vLLM's request."""

    input: TextOrTokens
    use_activation: bool = True

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
async def classify(request: ClassifyRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Label every input with one adapter, or with each of several."""
    return await respond(caller, "classify", request, indexed)
