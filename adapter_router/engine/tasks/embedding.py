"""Token vectors -> one embedding, as one adapter's settings and one row's parameters say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from adapter_router.engine.tasks.parameters import BOOLEAN, TEXT, checked, one_of, whole
from adapter_router.types import POOLINGS, Array, EmbeddingSettings


def settings_with(parameters: Mapping[str, Any], settings: EmbeddingSettings, hidden_size: int) -> EmbeddingSettings:
    """``settings``, overridden by a row's ``parameters``. Raises InvalidRequest with all that is wrong with them."""
    rules = {
        "pooling": one_of(POOLINGS),
        "normalize": BOOLEAN,
        "dimensions": whole(1, hidden_size),
        "prefix": TEXT,
    }
    return replace(settings, **checked("embedding", parameters, rules))


def pool(vectors: Array, mask: Array, settings: EmbeddingSettings) -> Array:
    """Float32 embedding (features,) of ``vectors`` (tokens, hidden); (tokens, features) with pooling "none".

    Tokens that ``mask`` does not attend to count for nothing; "none" keeps their rows all the same.
    """
    attended = vectors[mask.astype(bool)].astype(np.float64)
    if settings.pooling == "mean":
        pooled = attended.mean(axis=0)
    elif settings.pooling == "max":
        pooled = attended.max(axis=0)
    elif settings.pooling == "none":
        pooled = vectors.astype(np.float64)
    else:
        pooled = attended[0 if settings.pooling == "cls" else -1]
    cut = pooled[..., : settings.dimensions]
    if settings.normalize:
        cut = cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)
    embedding: Array = cut.astype(np.float32)
    return embedding
