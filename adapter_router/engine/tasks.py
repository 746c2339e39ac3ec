"""Task kinds: which transformers head serves them, and how one row's logits become its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import AutoModelForSequenceClassification

from adapter_router.types import Activation, Array, Classification, TaskKind

AUTO_CLASSES: dict[TaskKind, type] = {"text-classification": AutoModelForSequenceClassification}


def classify(logits: Array, labels: Sequence[str], activation: Activation) -> Classification:
    """Answer of ``text-classification`` for ``logits`` of shape (labels,)."""
    probs = activate(logits, activation)
    best = int(np.argmax(probs))
    return {
        "label": labels[best],
        "score": float(probs[best]),
        "probs": [float(p) for p in probs],
        "num_classes": len(labels),
    }


def activate(logits: Array, activation: Activation) -> Array:
    """Scores of ``logits`` in float64: softmax over labels, a sigmoid each, or the logits themselves."""
    wide = logits.astype(np.float64)
    if activation == "softmax":
        exponentials = np.exp(wide - wide.max())
        softmax: Array = exponentials / exponentials.sum()
        return softmax
    if activation == "sigmoid":
        sigmoid: Array = 0.5 * (1.0 + np.tanh(0.5 * wide))
        return sigmoid
    return wide
