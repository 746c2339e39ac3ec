"""``GET /v1/models`` and the loading and unloading of adapters, in vLLM's shapes and words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from adapter_router.errors import AdapterExists, AdapterNotFound, AdapterRouterError
from adapter_router.types import TaskKind
from deployments.router import Router, current_router

routes = APIRouter()


class LoadRequest(BaseModel):
    """vLLM's request, and the label names that PEFT does not store."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    task: TaskKind | None = None
    labels: list[str] | None = None


def _may_exist(path: str) -> bool:
    try:
        return path.startswith("package:") or Path(path).is_dir()
    except (OSError, ValueError):
        return False


class UnloadRequest(BaseModel):
    """vLLM's request; ``lora_int_id`` is accepted and ignored, as vLLM does."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


@routes.post("/v1/load_lora_adapter")
async def load(request: LoadRequest, router: Annotated[Router, Depends(current_router)]) -> PlainTextResponse:
    """Register an adapter directory that the server can read."""
    if not await asyncio.to_thread(_may_exist, request.lora_path):
        raise AdapterNotFound(f"Loading lora {request.lora_name} failed: No adapter found for {request.lora_path}")
    report = await router.load_adapter(
        request.lora_name, request.lora_path, request.task, request.labels, request.load_inplace
    )
    if isinstance(report, AdapterExists):
        raise AdapterExists(
            f"The lora adapter '{request.lora_name}' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True."
        )
    if isinstance(report, AdapterRouterError):
        raise report
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


@routes.post("/v1/unload_lora_adapter")
async def unload(request: UnloadRequest, router: Annotated[Router, Depends(current_router)]) -> PlainTextResponse:
    """Forget an adapter."""
    version = await router.unload_adapter(request.lora_name)
    if isinstance(version, AdapterRouterError):
        raise AdapterNotFound(f"The lora adapter '{request.lora_name}' cannot be found.")
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


@routes.get("/v1/models")
async def models(router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """The base and all adapters, OpenAI-shaped."""
    base, versions = await router.models()
    common = {"object": "model", "created": 0, "owned_by": "adapter-router"}
    data: list[dict[str, Any]] = [
        {"id": base.name, **common, "root": base.name, "parent": None, "max_model_len": base.max_tokens}
    ]
    for version in versions:
        metadata = {
            "task": version.task,
            "version": version.digest,
            "num_labels": len(version.labels),
            "labels": list(version.labels),
        }
        data.append({"id": version.adapter, **common, "root": None, "parent": base.name, "metadata": metadata})
    return {"object": "list", "data": data}
