"""What a merge is asked for, and everything that is wrong with the question itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from adapter_router.adapters.adapter_config import MAX_RANK
from adapter_router.merging.combination import COMBINATIONS, SIGN_METHODS, Combination, MergeType, SignMethod
from adapter_router.types import TASK_KINDS, TaskKind, is_unicode

_LARGEST = 1e9  # NaN is not below it
_LARGEST_SEED = 2**63 - 1
_LONGEST_NAME = 200
PolicyKind = Literal["refuse", "keep", "average"]


@dataclass(frozen=True)
class Part:
    """One adapter of a merge: ``name`` for messages and the head policy, ``directory`` as for loading, its weight."""

    name: str
    directory: str
    weight: float


@dataclass(frozen=True)
class HeadPolicy:
    """Whose head, labels and settings the result has.

    "refuse": a merge of adapters that bring heads is refused; "keep": the head of the part ``part``; "average": the
    weighted mean of equal ones. Saved modules inside the backbone are no heads: they are summed in any case, and so is
    what LoRA or changed biases add to a head, as in a mix: the result warns of it.
    """

    kind: PolicyKind = "refuse"
    part: str | None = None

    @classmethod
    def parse(cls, text: str) -> HeadPolicy:
        """``refuse``, ``average`` or ``keep=NAME``; anything else becomes a problem of the request."""
        kind, _, part = text.partition("=")
        return cls(cast(PolicyKind, kind), part or None)

    def __str__(self) -> str:
        return f"keep={self.part}" if self.kind == "keep" else self.kind


@dataclass(frozen=True)
class MergeRequest:
    """One merge.

    ``rank``: of the result, for types that cut it; None is the largest of the parts'. ``density`` (0, 1]: share of
    entries kept, for types that drop some. ``sign``: how the parts elect one ("total" if None), for types that do.
    ``seed``: of random drops. ``task``: as when loading, where the adapters do not say it.
    """

    parts: tuple[Part, ...]
    type: MergeType = "svd"
    rank: int | None = None
    density: float | None = None
    sign: SignMethod | None = None
    seed: int = 0
    head: HeadPolicy = field(default_factory=HeadPolicy)
    task: TaskKind | None = None

    @property
    def combination(self) -> Combination:
        """Raises KeyError for a type that does not exist."""
        return COMBINATIONS[self.type]

    @property
    def is_understood(self) -> bool:
        """Whether it can be told what would be done with the adapters, so that they can be checked for it."""
        return self.type in COMBINATIONS and self.head.kind in get_args(PolicyKind)

    def problems(self) -> list[str]:
        """Everything wrong with the request, before any file is looked at."""
        problems = _part_problems(self.parts) + _head_problems(self.head, self.parts)
        if self.task is not None and self.task not in TASK_KINDS:
            problems.append(f"task is {self.task!r:.80}, must be one of {', '.join(TASK_KINDS)}")
        if not _is_integer(self.seed) or not 0 <= self.seed <= _LARGEST_SEED:
            problems.append(f"seed is {self.seed!r:.80}, must be an integer from 0 to 2^63 - 1")
        if self.type not in COMBINATIONS:
            return [*problems, f"type is {self.type!r:.80}, must be one of {', '.join(COMBINATIONS)}"]
        return problems + self._setting_problems(self.combination)

    def _setting_problems(self, combination: Combination) -> list[str]:
        problems = []
        if self.rank is not None and not combination.cuts_rank:
            problems.append(f"rank is for types that cut it (svd, …_svd), {self.type} does not")
        elif self.rank is not None and not (_is_integer(self.rank) and 1 <= self.rank <= MAX_RANK):
            problems.append(f"rank is {self.rank!r:.80}, must be an integer from 1 to {MAX_RANK}")
        if not combination.drops and self.density is not None:
            problems.append(
                f"density is for types that drop entries (ties, dare, magnitude_prune), {self.type} does not"
            )
        elif combination.drops and not (is_number(self.density) and 0 < cast(float, self.density) <= 1):
            given = "missing" if self.density is None else repr(self.density)[:80]
            problems.append(f"density is {given}, {self.type} needs a number above 0 and up to 1")
        if self.sign is not None and not combination.elects:
            problems.append(f"sign is for types that elect one (ties, dare_ties), {self.type} does not")
        elif self.sign not in (None, *SIGN_METHODS):
            problems.append(f"sign is {self.sign!r:.80}, must be one of {', '.join(SIGN_METHODS)}")
        return problems


def _part_problems(parts: tuple[Part, ...]) -> list[str]:
    if not parts:
        return ["no adapters to merge"]
    problems = [
        f"an adapter is named {part.name!r:.80}, a name has 1 to {_LONGEST_NAME} characters and no '='"
        for part in parts
        if not (isinstance(part.name, str) and 0 < len(part.name) <= _LONGEST_NAME)
        or "=" in part.name
        or not is_unicode(part.name)
    ]
    problems += [
        f"{part.name}: its weight is {part.weight!r:.80}, must be a number of at most {_LARGEST:g}"
        for part in parts
        if not is_number(part.weight)
    ]
    repeated = sorted(str(name) for name, count in Counter(part.name for part in parts).items() if count > 1)
    if repeated:
        problems.append(f"several adapters are named {', '.join(repeated)}")
    if not problems and all(part.weight == 0 for part in parts):
        problems.append("all weights are 0: the result would change nothing")
    return problems


def _head_problems(head: HeadPolicy, parts: tuple[Part, ...]) -> list[str]:
    if head.kind not in get_args(PolicyKind):
        return [f"head policy is {head.kind!r:.80}, must be refuse, average or keep=NAME"]
    problems = []
    if head.kind != "keep" and head.part is not None:
        problems.append(f"head policy {head.kind} takes no name")
    if head.kind == "keep" and head.part not in [part.name for part in parts]:
        problems.append(f"head policy keep={head.part!s:.80} names none of the adapters")
    if head.kind == "average":
        weights = [part.weight for part in parts if is_number(part.weight)]
        if any(weight < 0 for weight in weights) or not sum(weights) > 0:
            problems.append("head policy average needs weights of at least 0 that are not all 0: it is a weighted mean")
    return problems


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a merge can count with it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
