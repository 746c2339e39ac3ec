"""One row's task, parameters and adapter -> how its raw output becomes its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter_router.engine.tasks import parameters as row_parameters
from adapter_router.engine.tasks.answers import answer_question
from adapter_router.engine.tasks.classification import classify
from adapter_router.engine.tasks.embedding import pool, settings_with
from adapter_router.engine.tasks.entities import label_tokens
from adapter_router.engine.tasks.scoring import token_logprobs
from adapter_router.engine.tasks.spans import TextSpans
from adapter_router.types import Activation, Array, EmbeddingSettings, Output, TaskKind


@dataclass(frozen=True)
class Reader:
    """Who answers: labels and activation of a classifier, settings of an embedding and how many numbers it has."""

    labels: tuple[str, ...]
    activation: Activation
    embedding: EmbeddingSettings
    hidden_size: int


@dataclass(frozen=True)
class Given:
    """What a row gave the model: its token ids and mask, and where they lie in the text."""

    features: Mapping[str, Array]
    spans: TextSpans | None


Answerer = Callable[[Array, Given], tuple[Output, Array]]
"""Raw output -> the answer, and the row's ``logits``."""


def answerer(task: TaskKind, reader: Reader, parameters: Mapping[str, Any]) -> Answerer:
    """Raises InvalidRequest with all that is wrong with ``parameters``."""
    return _ANSWERERS[task](task, reader, parameters)


def text_prefix(task: TaskKind, reader: Reader, parameters: Mapping[str, Any]) -> str:
    """What goes before a row's text."""
    return settings_with(parameters, reader.embedding, reader.hidden_size).prefix if task == "embedding" else ""


def _classification(task: TaskKind, reader: Reader, parameters: Mapping[str, Any]) -> Answerer:
    activate = row_parameters.classification(parameters, task).use_activation
    activation = reader.activation if activate else "none"
    return lambda raw, _: (classify(raw, reader.labels, activation), raw)


def _token_classification(_: TaskKind, reader: Reader, parameters: Mapping[str, Any]) -> Answerer:
    chosen = row_parameters.token_classification(parameters)

    def answer(raw: Array, given: Given) -> tuple[Output, Array]:
        return (
            label_tokens(
                raw, reader.labels, reader.activation, given.spans, chosen.aggregation_strategy, chosen.ignore_labels
            ),
            raw,
        )

    return answer


def _question_answering(_: TaskKind, __: Reader, parameters: Mapping[str, Any]) -> Answerer:
    chosen = row_parameters.question_answering(parameters)

    def answer(raw: Array, given: Given) -> tuple[Output, Array]:
        spans = given.spans if given.spans is not None and len(given.spans.texts) == 2 else None
        found = answer_question(raw, spans, chosen.top_k, chosen.max_answer_len, chosen.handle_impossible_answer)
        return found, raw

    return answer


def _embedding(_: TaskKind, reader: Reader, parameters: Mapping[str, Any]) -> Answerer:
    settings = settings_with(parameters, reader.embedding, reader.hidden_size)

    def answer(raw: Array, given: Given) -> tuple[Output, Array]:
        mask = given.features.get("attention_mask")
        vectors = raw.reshape(raw.shape[0], -1)
        embedding = pool(vectors, mask if mask is not None else vectors[:, 0] == vectors[:, 0], settings)
        return {"embedding": embedding.tolist()}, raw if settings.pooling == "none" else embedding

    return answer


def _generation(task: TaskKind, _: Reader, parameters: Mapping[str, Any]) -> Answerer:
    row_parameters.generation(parameters, task)
    ids = "decoder_input_ids" if task == "seq2seq-generation" else "input_ids"
    return lambda raw, given: (token_logprobs(raw, given.features[ids]), raw)


_ANSWERERS: Mapping[TaskKind, Callable[[TaskKind, Reader, Mapping[str, Any]], Answerer]] = {
    "text-classification": _classification,
    "token-classification": _token_classification,
    "question-answering": _question_answering,
    "image-classification": _classification,
    "embedding": _embedding,
    "text-generation": _generation,
    "seq2seq-generation": _generation,
}
