"""Which task an adapter serves, told from its configuration, its tensors' names and the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from adapter_router.types import TaskKind

TASK_TYPES: Mapping[str, TaskKind] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "embedding",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "seq2seq-generation",
}
# Saved modules that only one kind of model has.
_HEADS: Mapping[str, TaskKind] = {"qa_outputs": "question-answering", "lm_head": "text-generation"}


def choose_task(
    asked: Mapping[str, TaskKind | None], task_type: str | None, paths: Collection[str], served: tuple[TaskKind, ...]
) -> tuple[TaskKind | None, list[str]]:
    """The task, and what speaks against it.

    ``asked``: who names a task -> which, in order of precedence. ``paths``: modules of the file, as it spells them.
    ``served``: tasks of the base, its own first.
    """
    problems = []
    named = {who: task for who, task in asked.items() if task is not None}
    if task_type is not None:
        if task_type in TASK_TYPES:
            named[f"task_type {task_type}"] = TASK_TYPES[task_type]
        else:
            problems.append(f"task_type {task_type!r:.80} is none of {', '.join(TASK_TYPES)}")
    if len(set(named.values())) > 1:
        problems.append("the task is contradictory: " + ", ".join(f"{who} means {task}" for who, task in named.items()))
    task = next(iter(named.values()), None) or _guess(paths, served)
    if task not in served:
        problems.append(f"task {task} is not served by this base; served are {', '.join(served)}")
        return None, problems
    return task, problems


def _guess(paths: Collection[str], served: tuple[TaskKind, ...]) -> TaskKind:
    for head, task in _HEADS.items():
        if task in served and any(path.split(".")[-1] == head for path in paths):
            return task
    return served[0]
