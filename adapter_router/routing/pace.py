"""How fast a replica is, with what it is given."""

from __future__ import annotations

_HALF_LIFE_S = 2.0  # of work, not of time: a pause says nothing


class Pace:
    """Seconds for a token, all over all: large batches, which are what an overload consists of, count for most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long, with nothing else to do meanwhile."""
        fade = 0.5 ** (seconds / _HALF_LIFE_S)
        self._tokens = fade * self._tokens + tokens
        self._seconds = fade * self._seconds + seconds

    @property
    def token_s(self) -> float | None:
        """None while nothing is known."""
        return self._seconds / self._tokens if self._tokens else None
