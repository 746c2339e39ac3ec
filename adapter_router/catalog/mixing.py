"""A mix: a weighted sum of registered adapters in an adapter's place, as a version derived from theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from adapter_router.errors import InvalidRequest
from adapter_router.types import AdapterVersion, MixPart

_MAX_PARTS = 16
_MAX_WEIGHT = 10_000
_SHOWN = 80


def weight_problems(weights: Mapping[Any, Any], head: str | None) -> list[str]:
    """What is wrong with a mix before its adapters are looked up."""
    problems = []
    if not 1 <= len(weights) <= _MAX_PARTS:
        problems.append(f"a mix has {len(weights)} adapters, must have 1 to {_MAX_PARTS}")
    for name, weight in list(weights.items())[:_MAX_PARTS]:
        if not isinstance(name, str) or not name:
            problems.append(f"{name!r:.80} cannot name an adapter")
        # NaN is not below anything, and an integer may be too large to be made a float of.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= _MAX_WEIGHT:
            problems.append(
                f"the weight of {name!r:.80} is {_shown(weight)}, must be a number from -{_MAX_WEIGHT} to {_MAX_WEIGHT}"
            )
    if head is not None and head not in weights:
        problems.append(f"head {head!r:.80} is not among the mixed adapters")
    return problems


def spelled(weights: Mapping[Any, Any]) -> str:
    """A mix as people read it."""
    return " + ".join(f"{_shown(weight)} {_shown(name)}" for name, weight in [*weights.items()][:_MAX_PARTS])


def mixed(weights: Mapping[str, float], versions: Mapping[str, AdapterVersion], head: str | None) -> AdapterVersion:
    """The version that ``weights`` make of ``versions``, both by name. Raises InvalidRequest with every problem."""
    problems = []
    tasks = {name: version.task for name, version in versions.items()}
    if len(set(tasks.values())) > 1:
        problems.append(f"the mixed adapters serve different tasks: {_listed(tasks)}")
    if len({version.base for version in versions.values()}) > 1:
        problems.append(f"the mixed adapters belong to different bases: {', '.join(versions)}")
    chosen = _head(versions) if head is None else head
    if chosen is None:
        problems.append(f"more than one of the mixed adapters could answer: name one of {', '.join(versions)} as head")
    if chosen is None or problems:
        raise InvalidRequest("; ".join(problems), "head" if chosen is None else "model", problems)
    answering = versions[chosen]
    # In one order, whatever the caller's: sums of floats depend on it, and one mix shall have one version.
    parts = tuple(
        MixPart(versions[name], float(weight) + 0.0, name == chosen)  # -0.0 is 0.0
        for name, weight in sorted(weights.items(), key=lambda entry: (versions[entry[0]].digest, entry[0]))
    )
    return AdapterVersion(
        adapter=spelled(weights),
        digest=_digest(parts),
        directory=None,
        task=answering.task,
        labels=answering.labels,
        activation=answering.activation,
        embedding=answering.embedding,
        brings_head=answering.brings_head,
        num_bytes=sum(part.version.num_bytes for part in parts),
        base=answering.base,
        parts=parts,
    )


def _head(versions: Mapping[str, AdapterVersion]) -> str | None:
    """The one that must be meant: all answer alike, with the base's own head if any; None where there is a choice."""
    answers = {(version.labels, version.activation, version.embedding) for version in versions.values()}
    alike = len(answers) == 1 and not any(version.brings_head for version in versions.values())
    return min(versions, key=lambda name: versions[name].digest) if alike or len(versions) == 1 else None


def _digest(parts: tuple[MixPart, ...]) -> str:
    """Of all that decides what is computed: a head that is the base's is nobody's."""
    lines = [f"{p.version.digest} {p.weight.hex()} {'head' * (p.is_head and p.version.brings_head)}\n" for p in parts]
    return "sha256:" + hashlib.sha256(f"mix {parts[0].version.task}\n{''.join(lines)}".encode()).hexdigest()


def _shown(value: object) -> str:
    try:
        return f"{value!s:.{_SHOWN}}"
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"


def _listed(tasks: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {task}" for name, task in tasks.items())
