"""Every request and what came back, held against the answers each text gets alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """What a caller sees: who answered, which version of it, and what it said, before any activation."""

    adapter: str | None
    version: str
    logits: tuple[float, ...]

    def is_like(self, other: Answer) -> bool:
        """Whether nobody could tell the two apart."""
        return (self.adapter, self.version, len(self.logits)) == (
            other.adapter,
            other.version,
            len(other.logits),
        ) and max(abs(a - b) for a, b in zip(self.logits, other.logits, strict=True)) <= TOLERANCE


@dataclass
class Request:
    """``started``: on the caller's clock; ``replies``: when each came, and what it was.

    ``attempts``: calls that were made, without ``refusals``.
    """

    adapter: str
    text: str
    started: float
    attempts: int = 0
    replies: list[tuple[float, Answer | Exception]] = field(default_factory=list)
    refusals: int = 0

    @property
    def answered(self) -> bool:
        return any(isinstance(reply, Answer) for _, reply in self.replies)

    @property
    def seconds(self) -> float:
        """Until the first reply."""
        return self.replies[0][0] - self.started


@dataclass(frozen=True)
class Verdict:
    """Requests that nobody should ever find in here. ``retried`` were answered, but not at the first attempt."""

    lost: Sequence[Request]
    duplicated: Sequence[Request]
    wrong: Sequence[Request]
    retried: Sequence[Request]


class History:
    """Filled by one load, judged when that has stopped. ``alone``: the answers by adapter and text."""

    def __init__(self, alone: Mapping[tuple[str, str], Answer]) -> None:
        """Raises ValueError where two answers are alike: then nobody could tell whose answer a caller was given."""
        for (one, first), (other, second) in combinations(alone.items(), 2):
            if first.is_like(second):
                raise ValueError(f"{one} and {other} have the same answer")
        self._alone = alone
        self.requests: list[Request] = []

    @property
    def asked(self) -> Sequence[tuple[str, str]]:
        """What can be asked: adapters and texts."""
        return tuple(self._alone)

    def verdict(self) -> Verdict:
        """Of all requests so far."""
        return Verdict(
            lost=[request for request in self.requests if not request.answered],
            duplicated=[request for request in self.requests if len(request.replies) > 1],
            wrong=[request for request in self.requests if self._is_wrong(request)],
            retried=[request for request in self.requests if request.attempts > 1],
        )

    def _is_wrong(self, request: Request) -> bool:
        right = self._alone[request.adapter, request.text]
        return any(isinstance(reply, Answer) and not reply.is_like(right) for _, reply in request.replies)
