"""One request, several adapters: each answers the same inputs, or has its error in its place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, field_validator

from adapter_router.errors import AdapterRouterError
from adapter_router.types import Row, RowResult
from deployments.api.caller import Caller, results_of
from deployments.api.envelope import InferenceRequest, Text, TextRequest, answered_by, envelope, frame

MOST_MODELS = 64

Models = Annotated[list[Text], Field(min_length=1, max_length=MOST_MODELS)]

Shape = Callable[[Sequence[RowResult]], Any]
"""What one adapter's results are in the answer's ``data``."""


class FanOutRequest(TextRequest):
    """``model`` may also be a list of up to 64 names, each of which answers every input."""

    model: str | dict[str, float] | Models | None = None  # type: ignore[assignment]  # more than the others take

    @field_validator("model")
    @classmethod
    def _check_names(cls, model: object) -> object:
        return distinct(model) if isinstance(model, list) else model

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """As a row names it; None where there are several."""
        return None if isinstance(self.model, list) else super().adapter

    @abstractmethod
    def rows(self) -> list[Row]:
        """One row for each input."""


def distinct(names: list[str]) -> list[str]:
    """``names``. Raises ValueError where one stands twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(repr, twice))} stands there twice; answers are told apart by name")
    return names


async def respond(caller: Caller, kind: str, request: FanOutRequest, shape: Shape) -> dict[str, Any]:
    """The answer of one adapter, or of each that the request names."""
    rows = request.rows()
    if not isinstance(request.model, list):
        results = await caller.answer(rows, request.priority)
        return envelope(kind, request, results, data=shape(results))
    asked = {name: [replace(row, adapter=name) for row in rows] for name in request.model}
    return await respond_by_adapter(caller, kind, request, asked, shape)


async def respond_by_adapter(
    caller: Caller, kind: str, request: InferenceRequest, asked: Mapping[str, Sequence[Row]], shape: Shape
) -> dict[str, Any]:
    """What every adapter says, by name. Raises the first one's error when all fail."""
    rows = [row for own in asked.values() for row in own]
    outcomes = iter(await caller.outcomes(rows, request.priority, together=True))
    data: dict[str, Any] = {}
    answered: dict[str, list[RowResult]] = {}
    errors: list[AdapterRouterError] = []
    for name, own in asked.items():
        outcomes_of_one = [next(outcomes) for _ in own]
        try:
            results = results_of(outcomes_of_one)
            data[name] = shape(results)
            answered[name] = results
        except AdapterRouterError as error:
            data[name] = error.body()
            errors.append(error)
    if not answered:
        raise errors[0]
    everybodys = [result for results in answered.values() for result in results]
    adapters = {name: answered_by(results) for name, results in answered.items()}
    return {**frame(kind, request, list(asked), everybodys, data=data), "adapters": adapters}
