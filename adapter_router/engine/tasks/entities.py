"""Token classification: labelled tokens -> entities, by the rules of transformers' TokenClassificationPipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adapter_router.engine.tasks.classification import activate
from adapter_router.engine.tasks.parameters import AggregationStrategy
from adapter_router.engine.tasks.spans import TextSpans
from adapter_router.types import Activation, Array, Entity, TokenClassification


@dataclass(frozen=True)
class _Part:
    """One token, or one word, under its label: characters ``start`` to ``end``."""

    label: str
    score: float
    start: int
    end: int

    @property
    def tag(self) -> str:
        """The label without B- or I-."""
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label

    def continues(self, previous: _Part) -> bool:
        return self.tag == previous.tag and not self.label.startswith("B-")


def label_tokens(
    logits: Array,
    labels: Sequence[str],
    activation: Activation,
    spans: TextSpans | None,
    strategy: AggregationStrategy,
    ignore_labels: Sequence[str],
) -> TokenClassification:
    """Answer for ``logits`` of shape (tokens, labels); without ``spans`` every token stands for itself."""
    scores = activate(logits, activation)
    if spans is None:
        entities = [_token(index, row, labels, None) for index, row in enumerate(scores)]
    elif strategy == "none":
        entities = [_token(index, scores[index], labels, spans) for index in np.flatnonzero(~spans.special).tolist()]
    else:
        parts = [_part(word, scores, labels, spans, strategy) for word in _words(spans, strategy)]
        entities = [_entity(run, spans) for run in _runs(parts)]
    kept = [entity for entity in entities if entity.get("entity", entity.get("entity_group")) not in ignore_labels]
    return {"entities": kept}


def _token(index: int, scores: Array, labels: Sequence[str], spans: TextSpans | None) -> Entity:
    best = int(np.argmax(scores))
    start, end = spans.offsets[index].tolist() if spans else (None, None)
    return {
        "entity": labels[best],
        "score": float(scores[best]),
        "index": index,
        "word": spans.texts[0][start:end] if spans else None,
        "start": start,
        "end": end,
    }


def _words(spans: TextSpans, strategy: AggregationStrategy) -> list[list[int]]:
    """Tokens that must agree on a label: those of one word, or with "simple" each on its own."""
    words: list[list[int]] = []
    for index in np.flatnonzero(~spans.special).tolist():
        if words and spans.subwords[index] and strategy != "simple":
            words[-1].append(index)
        else:
            words.append([index])
    return words


def _part(
    word: Sequence[int], scores: Array, labels: Sequence[str], spans: TextSpans, strategy: AggregationStrategy
) -> _Part:
    of_tokens = scores[list(word)]
    if strategy == "average":
        row = of_tokens.mean(axis=0)
    elif strategy == "max":
        row = of_tokens[np.argmax(of_tokens.max(axis=1))]
    else:
        row = of_tokens[0]
    best = int(np.argmax(row))
    return _Part(labels[best], float(row[best]), int(spans.offsets[word[0], 0]), int(spans.offsets[word[-1], 1]))


def _runs(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Neighbours of one tag; B- opens a new run."""
    run: list[_Part] = []
    for part in parts:
        if run and not part.continues(run[-1]):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _entity(run: Sequence[_Part], spans: TextSpans) -> Entity:
    start, end = run[0].start, run[-1].end
    return {
        "entity_group": run[0].label.split("-", 1)[-1],
        "score": float(np.mean([part.score for part in run])),
        "word": spans.texts[0][start:end],
        "start": start,
        "end": end,
    }
