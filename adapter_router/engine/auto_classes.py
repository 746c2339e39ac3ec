"""Which of transformers' classes serve which task, and which of them a base has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from adapter_router.types import TaskKind

AUTO_CLASSES: Mapping[TaskKind, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "image-classification": AutoModelForImageClassification,
    "embedding": AutoModel,
    "text-generation": AutoModelForCausalLM,
    "seq2seq-generation": AutoModelForSeq2SeqLM,
}
CLASSIFIERS = frozenset({"text-classification", "token-classification", "image-classification"})
_ARCHITECTURES: Mapping[str, TaskKind] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "seq2seq-generation",
}
# What to take an architecture without a head for.
_USUAL: tuple[TaskKind, ...] = ("image-classification", "text-classification", "text-generation", "embedding")


def served_tasks(config: PretrainedConfig) -> tuple[TaskKind, ...]:
    """Tasks of the architecture, its checkpoint's own first. Raises ValueError when there is none."""
    tasks = [task for task, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        tasks = [task for task in tasks if task != "text-generation"]  # it reads in both directions
    if config.is_encoder_decoder:
        # Its other heads feed the decoder by rules of their own.
        tasks = [task for task in tasks if task == "seq2seq-generation"]
    if not tasks:
        raise ValueError(f"model_type {config.model_type!r} has no head for any of {', '.join(AUTO_CLASSES)}")
    names = config.architectures or []
    own = [task for name in names for ending, task in _ARCHITECTURES.items() if name.endswith(ending)]
    first = next((task for task in (*own, *_USUAL) if task in tasks), tasks[0])
    return (first, *(task for task in tasks if task != first))
