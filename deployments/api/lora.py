"""The loading and unloading of adapters in vLLM's shapes and words; ``/v1/adapters`` can do more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from adapter_router.errors import AdapterExists, AdapterNotFound, AdapterRouterError, InvalidRequest
from adapter_router.types import TaskKind
from deployments.router import Router, current_router

routes = APIRouter()


class LoadRequest(BaseModel):
    """vLLM's request, and what PEFT's files do not say: label names, where the task is not clear that, and the base.

    ``lora_path``: a directory that the server can read, ``package:…``, or a URI (docs/adapters.md).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    task: TaskKind | None = None
    labels: list[str] | None = None
    base: str | None = None


class UnloadRequest(BaseModel):
    """vLLM's request; ``lora_int_id`` is accepted and ignored, as vLLM does."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_int_id: int | None = None


class InvalidUserInput(InvalidRequest):
    type = "InvalidUserInput"


@routes.post("/v1/load_lora_adapter")
async def load(request: LoadRequest, router: Annotated[Router, Depends(current_router)]) -> PlainTextResponse:
    """Fetch, check, load and register an adapter; when it is refused nothing is registered."""
    if not request.lora_name or not request.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    if not await asyncio.to_thread(_may_exist, request.lora_path):
        raise AdapterNotFound(f"Loading lora {request.lora_name} failed: No adapter found for {request.lora_path}")
    report = await router.load_adapter(
        request.lora_name, request.lora_path, request.task, request.labels, request.load_inplace, request.base
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
    """Forget an adapter and its versions."""
    if not request.lora_name:
        raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
    removed = await router.unload_adapter(request.lora_name)
    if isinstance(removed, AdapterNotFound):
        raise AdapterNotFound(f"The lora adapter '{request.lora_name}' cannot be found.")
    if isinstance(removed, AdapterRouterError):
        raise removed
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


def _may_exist(path: str) -> bool:
    """Whether it is worth asking for: of a URI only its own source can tell."""
    try:
        return "://" in path or path.startswith("package:") or Path(path).is_dir()
    except (OSError, ValueError):
        return False
