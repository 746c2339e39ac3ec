"""Logits -> scores, and the answer of text- and image-classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapter_router.types import Activation, Array, Classification


def classify(logits: Array, labels: Sequence[str], activation: Activation) -> Classification:
    """Answer for ``logits`` of shape (labels,)."""
    probs = activate(logits, activation)
    best = int(np.argmax(probs))
    return {
        "label": labels[best],
        "score": float(probs[best]),
        "probs": [float(p) for p in probs],
        "num_classes": len(labels),
    }


def activate(logits: Array, activation: Activation) -> Array:
    """Scores of ``logits`` (…, labels) in float64: softmax over labels, a sigmoid each, or the logits themselves."""
    wide = logits.astype(np.float64)
    if activation == "softmax":
        exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
        softmax: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return softmax
    if activation == "sigmoid":
        sigmoid: Array = 0.5 * (1.0 + np.tanh(0.5 * wide))
        return sigmoid
    return wide
