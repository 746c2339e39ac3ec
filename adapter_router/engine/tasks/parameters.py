"""A row's ``parameters``: which exist for each task, what they may be, and their defaults.

``truncate_prompt_tokens`` belongs to every task on texts and is read where the row is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from adapter_router.errors import InvalidRequest
from adapter_router.types import TaskKind, is_unicode

AggregationStrategy = Literal["none", "simple", "first", "average", "max"]
MAX_TOP_K = 1000


class Rule(NamedTuple):
    """``expected``: what a value must be, in words."""

    expected: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Rule:
    """An integer in a range, both ends included."""
    expected = f"an integer from {least} to {most}" if most is not None else f"an integer of at least {least}"
    return Rule(
        expected,
        lambda value: (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value >= least
            and (most is None or value <= most)
        ),
    )


def one_of(names: Collection[str]) -> Rule:
    return Rule("one of " + ", ".join(names), lambda value: isinstance(value, str) and value in names)


BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str) and is_unicode(value))
TEXTS = Rule(
    "a list of texts", lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
)


@dataclass(frozen=True)
class ClassificationParameters:
    """Of text- and image-classification."""

    use_activation: bool = True


@dataclass(frozen=True)
class TokenClassificationParameters:
    aggregation_strategy: AggregationStrategy = "simple"
    ignore_labels: tuple[str, ...] = ("O",)


@dataclass(frozen=True)
class QuestionAnsweringParameters:
    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False


@dataclass(frozen=True)
class GenerationParameters:
    """Of text- and seq2seq-generation."""

    max_new_tokens: int = 16


def classification(parameters: Mapping[str, Any], task: TaskKind = "text-classification") -> ClassificationParameters:
    """Raises InvalidRequest with all that is wrong, as do those below."""
    return ClassificationParameters(**checked(task, parameters, {"use_activation": BOOLEAN}))


def token_classification(parameters: Mapping[str, Any]) -> TokenClassificationParameters:
    rules = {"aggregation_strategy": one_of(get_args(AggregationStrategy)), "ignore_labels": TEXTS}
    values = checked("token-classification", parameters, rules)
    if "ignore_labels" in values:
        values["ignore_labels"] = tuple(values["ignore_labels"])
    return TokenClassificationParameters(**values)


def question_answering(parameters: Mapping[str, Any]) -> QuestionAnsweringParameters:
    rules = {"top_k": whole(1, MAX_TOP_K), "max_answer_len": whole(1), "handle_impossible_answer": BOOLEAN}
    return QuestionAnsweringParameters(**checked("question-answering", parameters, rules))


def generation(parameters: Mapping[str, Any], task: TaskKind = "text-generation") -> GenerationParameters:
    return GenerationParameters(**checked(task, parameters, {"max_new_tokens": whole(1)}))


def checked(task: TaskKind, parameters: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The values given, None left out. Raises InvalidRequest naming every unknown name and every wrong value."""
    elsewhere = () if task == "image-classification" else ("truncate_prompt_tokens",)
    allowed = [*rules, *elsewhere]
    problems = {
        name: f"unknown parameter {name!r}; {task} takes {', '.join(allowed)}"
        for name in parameters
        if name not in allowed
    }
    given = {name: value for name, value in parameters.items() if name in rules and value is not None}
    problems |= {
        name: f"{name} must be {rules[name].expected}" for name, value in given.items() if not rules[name].holds(value)
    }
    if problems:
        raise InvalidRequest("; ".join(problems.values()), str(next(iter(problems))), tuple(problems.values()))
    return given
