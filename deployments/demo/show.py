"""The demo's questions over HTTP, by task, and its answers in a line each."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from adapter_router.types import Row, RowOutcome, RowResult, TaskKind
from deployments.demo.tenants import IMAGE_TENANTS, TEXT_TENANTS

_TASKS: Mapping[str, TaskKind] = {tenant.name: tenant.task for tenant in (*TEXT_TENANTS, *IMAGE_TENANTS)}
_ROUTES: Mapping[TaskKind, str] = {
    "text-classification": "/v1/classify",
    "token-classification": "/v1/token-classify",
    "question-answering": "/v1/question-answer",
    "embedding": "/v1/embeddings",
    "image-classification": "/v1/image-classify",
}
_SHOWN = 62


def expect(outcome: RowOutcome) -> RowResult:
    """The result, or its error raised."""
    if not isinstance(outcome, RowResult):
        raise outcome
    return outcome


def ask_over_http(http: httpx.Client, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers to one request a row, all at once: the router makes mixed batches of them."""

    def ask(row: Row) -> dict[str, Any]:
        route = _ROUTES[_TASKS[str(row.adapter)]]
        response = http.post(route, json={"model": row.adapter, **_asked(row)})
        answer = response.raise_for_status().json()
        return dict(answer["data"][0] if "data" in answer else answer)

    with ThreadPoolExecutor(len(rows)) as callers:
        return list(callers.map(ask, rows))


def _asked(row: Row) -> dict[str, Any]:
    if isinstance(row.inputs, tuple):
        return dict(zip(("question", "context"), row.inputs, strict=True))
    return {"input": base64.b64encode(row.inputs).decode() if isinstance(row.inputs, bytes) else row.inputs}


def alike(output: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two answers say the same."""
    if "embedding" in output:
        return bool(np.allclose(output["embedding"], other["embedding"], atol=1e-4))
    return headline(output) == headline(other)


def headline(output: Mapping[str, Any]) -> str:
    """An answer in few words."""
    if "label" in output:
        return str(output["label"])
    if "entities" in output:
        parts = [f"{entity['word']}={entity['entity_group']}" for entity in output["entities"]]
        return " ".join(parts[:2]) + (" …" if len(parts) > 2 else "")
    if "answers" in output:
        return str(output["answers"][0]["answer"])
    vector = output["embedding"]
    return f"{len(vector)} numbers, the first {vector[0]:+.3f}"


def print_table(rows: Sequence[Row], results: Sequence[RowResult]) -> None:
    """Every row, its answer and who gave it."""
    print(f"\n  {'tenant':17} {'input':{_SHOWN}} {'replica':9} {'version':11} answer")
    for row, result in zip(rows, results, strict=True):
        shown = f"image of {len(row.inputs)} bytes" if isinstance(row.inputs, bytes) else str(row.inputs)
        shown = " ".join(row.inputs) if isinstance(row.inputs, tuple) else shown
        version = result.version.removeprefix("sha256:")[:10]
        answer = headline(result.output)
        print(f"  {row.adapter:17} {shown:{_SHOWN}.{_SHOWN}} {result.replica!s:9.9} {version:11} {answer}")
    print()
