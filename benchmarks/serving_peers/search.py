"""The highest rate that still passes: up in steps until one fails, then between the two."""

from __future__ import annotations

import math

_STEP = 1.6
_CLOSE = 1.08  # how far apart the lowest failed and the highest passed rate may stay
_LOWEST = 0.5


class Search:
    """``rate`` is what to try next; ``best`` the highest that passed, None as long as none did."""

    def __init__(self, first: float) -> None:
        self.rate = first
        self.best: float | None = None
        self._failed: float | None = None

    @property
    def done(self) -> bool:
        """Whether trying more would tell nothing."""
        if self._failed is None:
            return False
        return self._failed < _LOWEST if self.best is None else self._failed / self.best < _CLOSE

    def note(self, passed: bool) -> None:
        """What came of ``rate``."""
        if passed:
            self.best = max(self.rate, self.best or 0.0)
        else:
            self._failed = min(self.rate, self._failed or math.inf)
        if self._failed is None:
            self.rate *= _STEP
        elif self.best is None:
            self.rate /= _STEP
        else:
            self.rate = math.sqrt(self.best * self._failed)
