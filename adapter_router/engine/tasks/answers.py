"""Question answering: start and end logits -> stretches of the context, by transformers' QuestionAnsweringPipeline.

That pipeline left transformers with version 5; the rules are those of its last release, for one window.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from adapter_router.engine.tasks.spans import TextSpans
from adapter_router.types import Answer, Array, QuestionAnswering

_CONTEXT = 1


def answer_question(
    logits: Array, spans: TextSpans | None, top_k: int, max_answer_len: int, handle_impossible_answer: bool
) -> QuestionAnswering:
    """Answer for ``logits`` of shape (tokens, 2), the texts being question and context."""
    if spans is None:
        return {"answers": []}
    probs, nothing = _probabilities(logits, spans)
    # More spans than asked for: some will turn out to be the same words.
    best = _best_spans(probs[:, 0], probs[:, 1], max_answer_len, 2 * top_k + 10)
    answers = _merged(_answer(first, last, score, spans) for first, last, score in best)
    if handle_impossible_answer or not answers:
        answers.append({"answer": "", "score": nothing if handle_impossible_answer else 0.0, "start": 0, "end": 0})
    return {"answers": sorted(answers, key=lambda answer: -answer["score"])[:top_k]}


def _probabilities(logits: Array, spans: TextSpans) -> tuple[Array, float]:
    """Of each token to start and to end the answer (0 outside the context), and of there being none."""
    context = (spans.sequences == _CONTEXT) & ~spans.special
    candidates = context.copy()
    candidates[:1] |= spans.no_answer
    if not candidates.any():
        return np.zeros(logits.shape), 0.0
    wide = np.where(candidates[:, None], logits.astype(np.float64), -np.inf)
    exponentials = np.exp(wide - wide.max(axis=0))
    probs = exponentials / exponentials.sum(axis=0)
    nothing = float(probs[0].prod()) if spans.no_answer else 0.0
    return probs * context[:, None], nothing


def _best_spans(starts: Array, ends: Array, longest: int, count: int) -> list[tuple[int, int, float]]:
    """The ``count`` spans of at most ``longest`` tokens with the highest ``starts[first] * ends[last]`` above 0."""
    width = min(longest, len(starts))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ends, (0, width - 1)), width)  # [first, length - 1]
    firsts = _largest(starts * windows.max(axis=1), count)  # no other token can open one of the best spans
    scores = starts[firsts, None] * windows[firsts]
    rows, lengths = np.unravel_index(_largest(scores.ravel(), count), scores.shape)
    found = zip(firsts[rows].tolist(), lengths.tolist(), scores[rows, lengths].tolist(), strict=True)
    return [(first, first + length, score) for first, length, score in found if score > 0]


def _largest(values: Array, count: int) -> Array:
    """Indices of the ``count`` largest values, largest first."""
    order: Array = np.argsort(-values, kind="stable")[:count]
    return order


def _answer(first: int, last: int, score: float, spans: TextSpans) -> Answer:
    """Widened to whole words where the tokenizer knows words at both ends."""
    if spans.words[first] >= 0 and spans.words[last] >= 0:
        first = int(_tokens_of_word(first, spans)[0])
        last = int(_tokens_of_word(last, spans)[-1])
    start, end = int(spans.offsets[first, 0]), int(spans.offsets[last, 1])
    return {"answer": spans.texts[_CONTEXT][start:end], "score": score, "start": start, "end": end}


def _tokens_of_word(token: int, spans: TextSpans) -> Array:
    return np.flatnonzero((spans.words == spans.words[token]) & (spans.sequences == _CONTEXT))


def _merged(answers: Iterable[Answer]) -> list[Answer]:
    """The same words count once, at their best place, with the sum of their scores."""
    merged: dict[str, Answer] = {}
    for answer in answers:
        known = merged.setdefault(answer["answer"].lower(), answer)
        if known is not answer:
            known["score"] += answer["score"]
    return list(merged.values())
