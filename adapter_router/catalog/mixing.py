"""A mix: a weighted sum of registered adapters in an adapter's place, as a version derived from theirs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from adapter_router.errors import InvalidRequest
from adapter_router.types import AdapterVersion, MixPart

_MAX_PARTS = 16
_MAX_WEIGHT = 1e4


def weight_problems(weights: Mapping[Any, Any], head: str | None) -> list[str]:
    """What is wrong with a mix before its adapters are looked up."""
    problems = []
    if not 1 <= len(weights) <= _MAX_PARTS:
        problems.append(f"a mix has {len(weights)} adapters, must have 1 to {_MAX_PARTS}")
    for name, weight in list(weights.items())[:_MAX_PARTS]:
        if not isinstance(name, str) or not name:
            problems.append(f"{name!r:.80} cannot name an adapter")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and abs(weight) <= _MAX_WEIGHT):
            problems.append(
                f"the weight of {name!r:.80} is {weight!r:.80}, must be a number of at most {_MAX_WEIGHT:g}"
            )
    if head is not None and head not in weights:
        problems.append(f"head {head!r:.80} is not among the mixed adapters")
    return problems


def mixed(weights: Mapping[str, float], versions: Mapping[str, AdapterVersion], head: str | None) -> AdapterVersion:
    """The version that ``weights`` make of ``versions``, both by name. Raises InvalidRequest with every problem."""
    problems = []
    tasks = {name: version.task for name, version in versions.items()}
    if len(set(tasks.values())) > 1:
        problems.append(f"the mixed adapters serve different tasks: {_listed(tasks)}")
    chosen = _head(versions) if head is None else head
    if chosen is None:
        problems.append(f"more than one of the mixed adapters could answer: name one of {', '.join(versions)} as head")
    if chosen is None or problems:
        raise InvalidRequest("; ".join(problems), "head" if chosen is None else "model", problems)
    answering = versions[chosen]
    # In one order, whatever the caller's: sums of floats depend on it, and one mix shall have one version.
    parts = tuple(
        MixPart(versions[name], float(weight), name == chosen)
        for name, weight in sorted(weights.items(), key=lambda entry: (versions[entry[0]].digest, entry[0]))
    )
    return AdapterVersion(
        adapter=" + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        digest=_digest(parts),
        directory=None,
        task=answering.task,
        labels=answering.labels,
        activation=answering.activation,
        embedding=answering.embedding,
        has_head=answering.has_head,
        parts=parts,
    )


def _head(versions: Mapping[str, AdapterVersion]) -> str | None:
    """The one that must be meant; None where there is a choice."""
    own = [name for name, version in versions.items() if version.has_head]
    if own:
        return own[0] if len(own) == 1 else None
    answers = {(version.labels, version.activation, version.embedding) for version in versions.values()}
    return min(versions, key=lambda name: versions[name].digest) if len(answers) == 1 else None


def _digest(parts: tuple[MixPart, ...]) -> str:
    lines = [f"{part.version.digest} {part.weight.hex()} {'head' * part.is_head}\n" for part in parts]
    return "sha256:" + hashlib.sha256("".join(["mix\n", *lines]).encode()).hexdigest()


def _listed(tasks: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {task}" for name, task in tasks.items())
