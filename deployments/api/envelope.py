"""What every dialect's bodies share: who is asked, for whom, and what comes around the answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapter_router.types import Inputs, RowResult

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
TextOrTokens = str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1)]


class MergedAdapters(BaseModel):
    """A mix in LoRAX's shape. ``weights`` are 1 where they are left out.

    ``merge_strategy`` must be said, and must be ours: the exact sum. LoRAX's own default, "linear", adds up factors,
    which is another model; that and the others are made beforehand, with ``adapter-router merge``.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    ids: Annotated[list[str], Field(min_length=1)]
    weights: list[float] | None = None
    merge_strategy: Literal["cat"]

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("ids names an adapter twice")
        if self.weights is not None and len(self.ids) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {len(self.ids)} ids")
        return self

    @cached_property
    def mix(self) -> dict[str, float]:
        """Weights by name."""
        return dict(zip(self.ids, self.weights or [1.0] * len(self.ids), strict=True))


class InferenceRequest(BaseModel):
    """``user``: gets one version of an adapter whose traffic is split, always the same.

    ``priority``: of one tenant's rows for one adapter lower values go first.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    request_id: str | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @cached_property
    def sticky_key(self) -> str:
        """All rows of one caller, or else of one request, get the same version of a split adapter."""
        return self.user or uuid.uuid4().hex


class AdapterRequest(InferenceRequest):
    """``model`` is an adapter's name, the base's, absent for the base, or the weights of a mix by name.

    ``merged_adapters`` is a mix, too. ``head``: see ``Row``.
    """

    model: str | dict[str, float] | None = None
    merged_adapters: MergedAdapters | None = None
    head: str | None = None

    @model_validator(mode="after")
    def _check_one_adapter(self) -> Self:
        if self.model and self.merged_adapters:
            raise ValueError("model and merged_adapters both say who answers; leave model out or empty")
        return self

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """As a row names it."""
        if self.merged_adapters:
            return self.merged_adapters.mix
        return None if self.model == "" else self.model


class TextRequest(AdapterRequest):
    truncate_prompt_tokens: int | None = None


def split_inputs(value: TextOrTokens) -> list[Inputs]:
    """The inputs of one request: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [{"input_ids": np.asarray(value)}]
    return [entry if isinstance(entry, str) else {"input_ids": np.asarray(entry)} for entry in value]


def envelope(kind: str, request: AdapterRequest, results: Sequence[RowResult], /, **content: Any) -> dict[str, Any]:
    """The whole body of an answer around ``content``: vLLM's fields, and which adapter version said it."""
    model = results[0].adapter if request.merged_adapters else request.model
    return {**frame(kind, request, model, results, **content), "adapter": answered_by(results)}


def frame(
    kind: str, request: InferenceRequest, model: Any, results: Sequence[RowResult], /, **content: Any
) -> dict[str, Any]:
    """vLLM's fields around ``content``; ``usage`` counts the tokens of every one of ``results``."""
    tokens = sum(result.num_tokens for result in results)
    return {
        "id": f"{kind}-{request.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        **content,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def answered_by(results: Sequence[RowResult]) -> dict[str, Any]:
    """The adapter, its version, and the replicas that gave ``results``."""
    parts = [{"name": name, "version": version, "weight": weight} for name, version, weight in results[0].parts]
    return {
        "name": results[0].adapter,
        "version": results[0].version,
        **({"parts": parts} if parts else {}),
        "replicas": sorted({result.replica or "" for result in results}),
    }


def indexed(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """Each answer with its place in the request."""
    return [{"index": index, **result.output} for index, result in enumerate(results)]
