"""An adapter directory's optional ``config.json``: label names and activation, which PEFT does not keep.

The file is Hugging Face's own model config, so what ``model.config.save_pretrained(adapter_dir)`` writes will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapter_router.adapters.strict_json import parse_object
from adapter_router.types import Activation, is_unicode

ACTIVATIONS: dict[str, Activation] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


def default_activation(num_labels: int) -> Activation:
    """Where no problem type is given, as transformers' pipeline does: one lone label is scored by a sigmoid."""
    return "sigmoid" if num_labels == 1 else "softmax"


@dataclass(frozen=True)
class HeadConfig:
    """``labels`` None: the file names none."""

    labels: tuple[str, ...] | None = None
    activation: Activation | None = None
    model_type: str | None = None


def parse_head_config(raw: bytes | None) -> tuple[HeadConfig, list[str]]:
    """The head's configuration and every problem with it; an absent file is an empty configuration."""
    if raw is None:
        return HeadConfig(), []
    document, problems = parse_object(raw, "config.json")
    if document is None:
        return HeadConfig(), problems
    labels, label_faults = _labels(document.get("id2label"))
    problems += label_faults
    if labels is not None and document.get("label2id", None) is not None:
        problems += _contradictions(labels, document["label2id"])
    problem_type = document.get("problem_type")
    activation = ACTIVATIONS.get(problem_type) if isinstance(problem_type, str) else None
    if problem_type is not None and activation is None:
        problems.append(f"config.json: problem_type {problem_type!r:.80} is none of {list(ACTIVATIONS)}")
    return HeadConfig(labels, activation, document.get("model_type")), problems


def label_problems(labels: Sequence[str]) -> list[str]:
    """What keeps names from being labels: repetition, and halves of surrogate pairs, which no answer can carry."""
    if not all(isinstance(label, str) for label in labels):
        return ["label names must be texts"]
    problems = []
    if len(set(labels)) != len(labels):
        problems.append("label names repeat")
    if any(not is_unicode(label) for label in labels):
        problems.append("a label name holds half of a surrogate pair")
    return problems


def _labels(id2label: Any) -> tuple[tuple[str, ...] | None, list[str]]:
    if id2label is None:
        return None, []
    try:
        names = {int(index): name for index, name in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        return None, ["config.json: id2label is not an object of index -> name"]
    if sorted(names) != list(range(len(names))):
        indices = sorted(names)[:8]
        return None, [f"config.json: id2label has the indices {indices}, expected 0 to {len(names) - 1}"]
    labels = tuple(names[index] for index in range(len(names)))
    return labels, [f"config.json: id2label: {problem}" for problem in label_problems(labels)]


def _contradictions(labels: Sequence[str], label2id: Any) -> list[str]:
    if isinstance(label2id, dict) and all(label2id.get(label) == index for index, label in enumerate(labels)):
        return []
    return ["config.json: id2label and label2id contradict each other"]
