"""``POST /v1/classify_multi``: one text, many classifiers, of whole texts and of tokens side by side."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import Field, field_validator

from adapter_router.errors import AdapterRouterError
from adapter_router.types import Row, TaskKind
from deployments.api.caller import Caller, CurrentCaller
from deployments.api.envelope import InferenceRequest, Texts, indexed
from deployments.api.fan_out import Models, distinct, respond_by_adapter
from deployments.api.token_classify import AggregationStrategy

routes = APIRouter()


class ClassifyMultiRequest(InferenceRequest):
    """``models``: up to 64 names. Parameters go to the adapters whose task has them."""

    models: Models
    input: str | Texts
    truncate_prompt_tokens: int | None = None
    use_activation: bool = True
    aggregation_strategy: AggregationStrategy = "simple"
    ignore_labels: list[str] = Field(default=["O"])

    @field_validator("models")
    @classmethod
    def _check_names(cls, models: list[str]) -> list[str]:
        return distinct(models)

    def rows(self, name: str, task: TaskKind) -> list[Row]:
        """One row for each text."""
        parameters: dict[str, Any] = {"truncate_prompt_tokens": self.truncate_prompt_tokens}
        if task == "token-classification":
            parameters |= {"aggregation_strategy": self.aggregation_strategy, "ignore_labels": self.ignore_labels}
        else:
            parameters |= {"use_activation": self.use_activation}
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [Row(text, name, task, parameters, sticky_key=self.sticky_key) for text in texts]


@routes.post("/v1/classify_multi")
async def classify_multi(request: ClassifyMultiRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Label every text, or its tokens, with each of several adapters."""
    tasks = await asyncio.gather(
        *(_task(caller, Row("", name, sticky_key=request.sticky_key)) for name in request.models)
    )
    asked = {name: request.rows(name, task) for name, task in zip(request.models, tasks, strict=True)}
    return await respond_by_adapter(caller, "classify-multi", request, asked, indexed)


async def _task(caller: Caller, row: Row) -> TaskKind:
    """What the row's adapter is asked for: it refuses what it does not serve, and is refused where it is not known."""
    version = await caller.version_of(row)
    if isinstance(version, AdapterRouterError):
        return "text-classification"
    task = version.task if version else caller.router.base_of(row).tasks[0]
    return task if task == "token-classification" else "text-classification"
