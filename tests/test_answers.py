"""Raw outputs -> answers, against transformers' own pipelines on random logits, and torch's own formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TokenClassificationPipeline,
)
from transformers.pipelines.document_question_answering import select_starts_ends

from adapter_router.catalog.location import resolve
from adapter_router.engine.tasks import (
    TextSpans,
    answer_question,
    classify,
    label_tokens,
    parameters,
    pool,
    settings_with,
    token_logprobs,
)
from adapter_router.errors import InvalidRequest
from adapter_router.types import Answer, EmbeddingSettings
from deployments.demo.tenants import BASE

STRATEGIES: tuple[parameters.AggregationStrategy, ...] = ("none", "simple", "first", "average", "max")
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC", "X-ray-date")
WORDS = (
    *(
        "in",
        "Paris",
        "paris",
        "PARIS",
        "and",
        "New York",
        "Obama",
        "electroencephalography",
        "McDonald's",
        "unbelievably",
        "x",
    ),
    *("caf\u00e9", "cafe\u0301", "\u0130stanbul", "stra\u00dfe", "\ud55c\uad6d\uc5b4", "\u6771\u4eac", "\U0001f600"),
    *(
        ",",
        ".",
        "!?",
        "(",
        ")",
        "-",
        "--",
        "3.14",
        "$5",
        "e.g.",
        "[SEP]",
        "[UNK]",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u00ad",
    ),
)
GAPS = (" ", " ", " ", "", "  ", "\n", "\u00a0")


def random_text(rng: np.random.Generator, longest: int = 14) -> str:
    count = rng.integers(1, longest + 1)
    return "".join(WORDS[w] + GAPS[g] for w, g in rng.integers((0, 0), (len(WORDS), len(GAPS)), (count, 2)))


@cache
def tokenizer(kind: str) -> Any:
    """WordPiece marks the inside of words; byte-level BPE does not; Metaspace BPE knows no words in the first place."""
    if kind == "wordpiece":
        return AutoTokenizer.from_pretrained(resolve(BASE))
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte-level":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS[:-8])] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


def spans_of(tokenizer: Any, *texts: str) -> TextSpans:
    return TextSpans.of(
        texts,
        tokenizer(*texts)[0],
        unk_token_id=tokenizer.unk_token_id,
        cls_token_id=tokenizer.cls_token_id,
        marks_pieces=bool(getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)),
    )


# -- entities --------------------------------------------------------------------------------------------------------


@cache
def entity_pipeline(kind: str) -> TokenClassificationPipeline:
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        id2label=dict(enumerate(LABELS)),
    )
    return TokenClassificationPipeline(model=BertForTokenClassification(config), tokenizer=tokenizer(kind))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "metaspace"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_are_the_pipelines(kind: str, strategy: parameters.AggregationStrategy) -> None:
    rng = np.random.default_rng(0)
    pipeline = entity_pipeline(kind)
    for _ in range(300):
        text = random_text(rng)
        (inputs,) = pipeline.preprocess(text, is_split_into_words=False)
        logits = rng.normal(size=(inputs["input_ids"].shape[1], len(LABELS)), scale=2.0).astype(np.float32)
        ignored = [["O"], [], ["PER", "date"], ["B-PER", "O"]][rng.integers(4)]
        expected = pipeline.postprocess(
            [{**inputs, "logits": torch.from_numpy(logits)[None]}],
            pipeline._sanitize_parameters(aggregation_strategy=strategy)[2]["aggregation_strategy"],
            ignored,
        )
        answer = label_tokens(logits, LABELS, "softmax", spans_of(pipeline.tokenizer, text), strategy, ignored)
        for ours, theirs in zip(answer["entities"], expected, strict=True):
            assert ours["word"] == text[ours["start"] : ours["end"]]
            assert ours["score"] == pytest.approx(float(theirs["score"]), abs=1e-5)
            assert _apart(dict(ours)) == _apart(theirs), text


def _apart(entity: dict[str, Any]) -> dict[str, Any]:
    """All but the score, and the word, which is our slice of the text and their tokens joined again."""
    return {name: value for name, value in entity.items() if name not in {"score", "word"}}


def test_entities_of_features_stand_for_one_token_each() -> None:
    logits = np.eye(len(LABELS), dtype=np.float32)[[0, 1, 2, 5]] * 9
    (first, second, third) = label_tokens(logits, LABELS, "sigmoid", None, "simple", ["O"])["entities"]
    assert [first["entity"], second["entity"], third["entity"]] == ["B-PER", "I-PER", "MISC"]
    assert [first["index"], second["index"], third["index"]] == [1, 2, 3]
    assert first["word"] is first["start"] is first["end"] is None
    assert first["score"] == pytest.approx(1 / (1 + math.exp(-9)))


# -- answers ---------------------------------------------------------------------------------------------------------


def pipeline_answers(
    logits: np.ndarray, encoding: Any, context: str, top_k: int, longest: int, impossible: bool
) -> list[Answer]:
    """What was QuestionAnsweringPipeline.postprocess, over transformers' spans and tokenizers' words."""
    masked = np.array([[sequence != 1 for sequence in encoding.sequence_ids]])
    masked[0, 0] &= not encoding.special_tokens_mask[0]
    starts, ends, scores, nothing = select_starts_ends(
        logits[None, :, 0], logits[None, :, 1], masked.astype(int), None, 1e6, top_k * 2 + 10, impossible, longest
    )
    answers: dict[str, Answer] = {}
    for first, last, score in zip(starts, ends, scores, strict=True):
        try:
            start = encoding.word_to_chars(encoding.token_to_word(first), 1)[0]
            end = encoding.word_to_chars(encoding.token_to_word(last), 1)[1]
        except TypeError:
            start, end = encoding.offsets[first][0], encoding.offsets[last][1]
        text = context[start:end]
        answer = answers.setdefault(text.lower(), {"answer": text, "score": 0.0, "start": start, "end": end})
        answer["score"] += score.item()
    nobody: list[Answer] = [{"answer": "", "score": nothing, "start": 0, "end": 0}] if impossible else []
    return sorted([*answers.values(), *nobody], key=lambda answer: -answer["score"])[:top_k]


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "metaspace"])
def test_answers_are_the_pipelines(kind: str) -> None:
    rng = np.random.default_rng(1)
    fast = tokenizer(kind)
    for _ in range(600):
        question, context = random_text(rng, 4), random_text(rng, 30)
        encoding = fast(question, context)[0]
        logits = rng.normal(size=(len(encoding.ids), 2), scale=3.0)
        top_k, longest, impossible = int(rng.integers(1, 6)), int(rng.integers(1, 20)), bool(rng.integers(2))
        expected = pipeline_answers(logits, encoding, context, top_k, longest, impossible)
        answers = answer_question(logits, spans_of(fast, question, context), top_k, longest, impossible)["answers"]
        # Theirs also lists spans that cannot be, with a score of 0.
        likely = [answer for answer in answers if answer["score"] > 1e-9]
        assert [_rounded(a) for a in likely] == [_rounded(a) for a in expected if a["score"] > 1e-9]
        assert answers and len(answers) <= top_k


def _rounded(answer: Answer) -> tuple[str, int, int, float]:
    return answer["answer"], answer["start"], answer["end"], float(f"{answer['score']:.6g}")


def test_an_answer_is_widened_to_whole_words_where_there_are_words() -> None:
    question, context = "who", "an unbelievably electroencephalographic day"
    spans = spans_of(tokenizer("wordpiece"), question, context)
    logits = np.zeros((len(spans.words), 2))
    (inside,) = np.flatnonzero(spans.subwords & (spans.words == 1) & (spans.sequences == 1))[:1]
    logits[inside] = 20
    (whole,) = answer_question(logits, spans, 1, 15, False)["answers"]
    assert whole["answer"] == "unbelievably"
    (piece,) = answer_question(logits, replace(spans, words=np.full_like(spans.words, -1)), 1, 15, False)["answers"]
    assert [piece["start"], piece["end"]] == spans.offsets[inside].tolist() and piece["answer"] in "unbelievably"


def test_answers_without_a_context_or_a_text() -> None:
    fast = tokenizer("wordpiece")
    logits = np.zeros((len(fast("why", " ")["input_ids"]), 2))
    spans = spans_of(fast, "why", " ")
    assert answer_question(logits, spans, 3, 15, False)["answers"] == [
        {"answer": "", "score": 0.0, "start": 0, "end": 0}
    ]
    assert answer_question(logits, spans, 1, 15, True)["answers"][0]["score"] == 1.0
    assert answer_question(logits, None, 1, 15, True)["answers"] == []


def test_a_long_context_costs_little_memory() -> None:
    length = 20_000
    numbers = np.arange(length)
    spans = TextSpans(
        ("q", "x" * length),
        np.stack([numbers, numbers + 1], 1),
        np.zeros(length, dtype=bool),
        numbers,
        np.ones(length, dtype=np.int64),
        np.zeros(length, dtype=bool),
    )
    logits = np.random.default_rng(2).normal(size=(length, 2)) * 4
    (answer,) = answer_question(logits, spans, 1, length, False)["answers"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=0)
    assert answer["score"] >= max(probs[i, 0] * probs[i:, 1].max() for i in range(length)) - 1e-15


# -- embeddings, classes, tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [3.0, 4.0, 1.0]), ("cls", [1.0, 8.0, 2.0]), ("last", [5.0, 0.0, 0.0]), ("max", [5.0, 8.0, 2.0])],
)
def test_pooling(pooling: Any, expected: list[float]) -> None:
    vectors = np.array([[9, 9, 9], [1, 8, 2], [5, 0, 0], [9, 9, 9]], dtype=np.float16)
    mask = np.array([0, 1, 1, 0])
    plain = pool(vectors, mask, EmbeddingSettings(pooling, normalize=False))
    assert plain.dtype == np.float32 and plain.tolist() == expected
    cut = pool(vectors, mask, EmbeddingSettings(pooling, dimensions=2))
    assert cut == pytest.approx(np.array(expected[:2]) / math.hypot(*expected[:2]))


def test_pooling_none_keeps_every_token_and_a_zero_vector_stays_zero() -> None:
    vectors = np.array([[3, 4], [0, 0]], dtype=np.float32)
    assert pool(vectors, np.ones(2), EmbeddingSettings("none")).tolist() == pytest.approx(
        np.array([[0.6, 0.8], [0, 0]])
    )


def test_row_parameters_override_the_adapters_settings() -> None:
    settings = EmbeddingSettings("cls", normalize=True, prefix="query: ")
    row = {"dimensions": 8, "normalize": False, "prefix": None, "truncate_prompt_tokens": 3}
    assert settings_with(row, settings, 8) == EmbeddingSettings("cls", False, 8, "query: ")


def test_token_logprobs_are_torchs() -> None:
    rng = np.random.default_rng(3)
    logits, ids = rng.normal(size=(9, 50)).astype(np.float32) * 30, rng.integers(0, 50, 9)
    first, *others = token_logprobs(logits, ids)["token_logprobs"]
    logs = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    assert first is None and others == pytest.approx([float(logs[i, ids[i + 1]]) for i in range(8)], abs=1e-12)


@pytest.mark.parametrize(
    ("activation", "probs"), [("softmax", [0.0, 1.0]), ("sigmoid", [0.5, 1.0]), ("none", [0.0, 999.0])]
)
def test_classify_survives_large_logits(activation: Any, probs: list[float]) -> None:
    answer = classify(np.array([0, 999], dtype=np.float32), ["no", "yes"], activation)
    assert answer == {"label": "yes", "score": probs[1], "probs": probs, "num_classes": 2}


# -- parameters ------------------------------------------------------------------------------------------------------


def test_absent_parameters_have_their_defaults() -> None:
    cut = {"truncate_prompt_tokens": -1}
    assert parameters.classification({**cut, "use_activation": None}).use_activation is True
    assert parameters.token_classification(cut) == parameters.TokenClassificationParameters("simple", ("O",))
    assert parameters.token_classification({"ignore_labels": []}).ignore_labels == ()
    assert parameters.question_answering({"top_k": None}) == parameters.QuestionAnsweringParameters(1, 15, False)
    assert parameters.generation({"max_new_tokens": None}).max_new_tokens == 16


@pytest.mark.parametrize(
    ("read", "given", "problems"),
    [
        (parameters.classification, {"use_activation": 1}, ["use_activation must be true or false"]),
        (parameters.classification, {"top_k": 1}, ["takes use_activation, truncate_prompt_tokens"]),
        (
            lambda given: parameters.classification(given, "image-classification"),
            {"truncate_prompt_tokens": 3},
            ["image-classification takes use_activation"],
        ),
        (
            parameters.token_classification,
            {"aggregation_strategy": "median", "ignore_labels": "O"},
            ["one of none, simple, first, average, max", "ignore_labels must be a list of texts"],
        ),
        (
            parameters.question_answering,
            {"top_k": 0, "max_answer_len": True, "handle_impossible_answer": "no", "stride": 3},
            ["unknown parameter 'stride'", "from 1 to 1000", "at least 1", "true or false"],
        ),
        (parameters.generation, {"max_new_tokens": 0}, ["max_new_tokens must be an integer of at least 1"]),
        (
            lambda given: settings_with(given, EmbeddingSettings(), 384),
            {"pooling": "median", "dimensions": 385, "normalize": 1, "prefix": "\ud800"},
            ["one of mean, cls, last, max, none", "true or false", "from 1 to 384", "prefix must be a text"],
        ),
    ],
)
def test_wrong_parameters_are_all_named(read: Any, given: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(given)
    assert len(caught.value.problems) == len(problems) and caught.value.param in given
    assert all(problem in str(caught.value) for problem in problems), str(caught.value)
