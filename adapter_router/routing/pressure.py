"""What rows ask of the replicas just now: rates, and the adapters they need. Autoscaling goes by it."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_router.routing.demand import Demand
from adapter_router.routing.working_set import WorkingSet
from adapter_router.types import AdapterVersion

_TOKENS = "tokens"
_MISSED = "missed"


@dataclass(frozen=True)
class RouterLoad:
    """Of one base on one router. ``queued_rows`` wait to be sent; ``open_tokens`` are in rows without an answer.

    ``waited_s``: how long the oldest of the waiting rows has waited. ``tokens_s``, ``missed_s``: tokens that came, and
    rows whose time was over, a second. ``working_set_bytes``, ``working_set_adapters``: see ``WorkingSet``.
    ``idle_s``: since anything was asked; 0 while something waits for an answer.
    """

    queued_rows: int = 0
    open_tokens: int = 0
    waited_s: float = 0.0
    tokens_s: float = 0.0
    missed_s: float = 0.0
    working_set_bytes: int = 0
    working_set_adapters: int = 0
    idle_s: float = 0.0


class Pressure:
    """Counts what comes; the caller brings the clock."""

    def __init__(self) -> None:
        self.demand = Demand()
        self._working_set = WorkingSet()
        self._rates = Demand()
        self._busy_until: float | None = None

    def asked(self, version: AdapterVersion, rows: int, now: float) -> None:
        """So many rows of one adapter came."""
        self.demand.note(version.digest, rows, now)
        for _ in range(min(rows, 2)):
            self._working_set.note(version.digest, version.num_bytes, now)

    def came(self, tokens: int, now: float) -> None:
        """So many tokens came, of any adapter."""
        self._rates.note(_TOKENS, tokens, now)
        self._busy_until = now

    def missed(self, rows: int, now: float) -> None:
        """The time of so many rows was over before their answers were there."""
        self._rates.note(_MISSED, rows, now)

    def load(self, queued_rows: int, open_tokens: int, waited_s: float, now: float) -> RouterLoad:
        """All of it together."""
        if open_tokens or self._busy_until is None:
            self._busy_until = now
        return RouterLoad(
            queued_rows,
            open_tokens,
            waited_s,
            self._rates.rate(_TOKENS, now),
            self._rates.rate(_MISSED, now),
            self._working_set.num_bytes(now),
            self._working_set.num_adapters(now),
            now - self._busy_until,
        )
