"""``POST /v1/score`` and ``POST /v1/rerank`` in vLLM's shapes.

A pair's score is the one label's probability of a cross-encoder, or the cosine of two embeddings: as the adapter's
task says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import numpy as np
from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from adapter_router.errors import InvalidRequest, TaskMismatch
from adapter_router.types import AdapterVersion, Array, Classification, Row, RowResult, TaskKind
from deployments.api.caller import Caller, CurrentCaller
from deployments.api.embeddings import vector
from deployments.api.envelope import TextRequest, Texts, envelope

routes = APIRouter()


class ScoreRequest(TextRequest):
    """One text against one or many, or many against as many, in any of vLLM's spellings."""

    text_1: Annotated[str | Texts, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))]
    text_2: Annotated[str | Texts, Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))]

    def sides(self) -> tuple[list[str], list[str]]:
        """Texts left and right; one on the left is for all on the right."""
        left, right = ([side] if isinstance(side, str) else side for side in (self.text_1, self.text_2))
        if len(left) not in {1, len(right)}:
            raise InvalidRequest(
                f"{len(left)} texts against {len(right)}: send one, or as many on both sides", "text_1"
            )
        return left, right


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str


class RerankRequest(TextRequest):
    """``top_n`` 0 means all."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] = 0
    return_documents: bool = True


@routes.post("/v1/score")
@routes.post("/score", include_in_schema=False)
async def score(request: ScoreRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Score pairs of texts with one adapter."""
    results, scores = await _scored(caller, request, *request.sides())
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return envelope("score", request, results, data=data)


@routes.post("/v1/rerank")
@routes.post("/rerank", include_in_schema=False)
async def rerank(request: RerankRequest, caller: CurrentCaller) -> dict[str, Any]:
    """Documents in order of their relevance to the query."""
    texts = [document if isinstance(document, str) else document.text for document in request.documents]
    results, scores = await _scored(caller, request, [request.query], texts)
    ranked: list[dict[str, Any]] = []
    for index in sorted(range(len(texts)), key=lambda index: -scores[index])[: request.top_n or None]:
        document = {"document": {"text": texts[index]}} if request.return_documents else {}
        ranked.append({"index": index, **document, "relevance_score": scores[index]})
    return envelope("rerank", request, results, results=ranked)


async def _scored(
    caller: Caller, request: TextRequest, left: Sequence[str], right: Sequence[str]
) -> tuple[list[RowResult], list[float]]:
    """One score for each text on the right."""
    parameters = {"truncate_prompt_tokens": request.truncate_prompt_tokens}

    def row(inputs: str | tuple[str, str], task: TaskKind) -> Row:
        return Row(inputs, request.adapter, task, parameters, request.head, request.sticky_key)

    if await _task(caller, row(right[0], "embedding")) == "embedding":
        rows = [row(text, "embedding") for text in (*left, *right)]
        results = await caller.answer(rows, request.priority)
        return results, _cosines(results[: len(left)], results[len(left) :])
    pairs = zip(list(left) * (len(right) // len(left)), right, strict=True)
    results = await caller.answer([row(pair, "text-classification") for pair in pairs], request.priority)
    return results, [_only_label(result) for result in results]


async def _task(caller: Caller, row: Row) -> TaskKind:
    """What the row's adapter does; the bare base classifies where it has a head for it, and embeds where it can."""
    version = await caller.version_of(row)
    if isinstance(version, AdapterVersion):
        return version.task
    base = caller.router.base_of(row)
    return "embedding" if base.labels is None and "embedding" in base.tasks else "text-classification"


def _only_label(result: RowResult) -> float:
    output = cast(Classification, result.output)
    if output["num_classes"] != 1:
        raise TaskMismatch(
            f"adapter {result.adapter!r} has {output['num_classes']} labels; pairs are scored by an adapter with one, "
            "or by one that embeds",
            "model",
        )
    return output["probs"][0]


def _cosines(left: Sequence[RowResult], right: Sequence[RowResult]) -> list[float]:
    cosines = (_directions(left) * _directions(right)).sum(axis=1)
    return [float(cosine) for cosine in cosines]


def _directions(results: Sequence[RowResult]) -> Array:
    """Embeddings of length 1 (a zero one stays zero), in float64."""
    vectors = [np.asarray(vector(result), dtype=np.float64) for result in results]
    if any(array.ndim != 1 for array in vectors):
        raise TaskMismatch(f"adapter {results[0].adapter!r} gives one vector a token, not one a text", "model")
    stacked = np.stack(vectors)
    directions: Array = stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
    return directions
