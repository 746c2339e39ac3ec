"""One row's raw output -> its answer, a file for each family of tasks: pure functions of arrays, without torch."""

from adapter_router.engine.tasks.answers import answer_question
from adapter_router.engine.tasks.classification import activate, classify
from adapter_router.engine.tasks.embedding import pool, settings_with
from adapter_router.engine.tasks.entities import label_tokens
from adapter_router.engine.tasks.scoring import token_logprobs
from adapter_router.engine.tasks.spans import TextSpans

__all__ = [
    "TextSpans",
    "activate",
    "answer_question",
    "classify",
    "label_tokens",
    "pool",
    "settings_with",
    "token_logprobs",
]
