"""Who may queue: limits for all and for each tenant, and no row that would be late anyway. Refuses at once, with 429.

A tenant's limit moves with what is free, the dynamic thresholds of Choudhury and Hahne (IEEE/ACM Transactions on
Networking, 1998): it may hold its weight times what is still free. Alone it fills half of the queue; with others each
gets less, and there is room for who comes next, however many there are. Who has nothing queued is not remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InvalidRequest, Overloaded

_LOWEST_RETRY_S, _HIGHEST_RETRY_S = 1.0, 60.0
_MARGIN = 0.8  # of a row's time, what its wait may take: the estimate errs, and the forward comes after it


@dataclass(frozen=True)
class Backlog:
    """What a row that comes now finds: ``tokens`` that can run and wait for a replica, or 0 while one is free.

    ``tokens_s``: what all replicas together serve a second, None while that is not known.
    """

    tokens: int = 0
    tokens_s: float | None = None


@dataclass
class _Queued:
    rows: int = 0
    tokens: int = 0

    def add(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens


@dataclass(frozen=True)
class _Limit:
    """One unit of what may be queued, and a call that asks for ``more`` of it."""

    unit: str
    most: int
    total: int
    own: int
    more: int
    alone: bool  # one row of a tenant that has none

    def most_in_a_call(self, weight: float) -> int:
        return self.most if self.alone else max(1, int(self.most * weight / (1 + weight)))

    def excess(self, weight: float, share: float) -> float:
        """How much must drain, of all, before the call fits; of it ``share`` is the tenant's own. Not above 0: none."""
        free = self.most - self.total - self.more
        return -free if self.alone else (self.own + self.more - weight * free) / (weight + share)

    def message(self, tenant: str) -> str:
        if self.total + self.more > self.most:
            return f"{self.total} {self.unit} are waiting, at most {self.most} may"
        return (
            f"tenant {tenant!r:.80} has {self.own} {self.unit} waiting; with {self.more} more it would hold more than "
            f"its share of the {self.most - self.total} that are free"
        )


class Admission:
    """Counts rows from ``entered`` to ``left``."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config
        self._total = _Queued()
        self._tenants: dict[str, _Queued] = {}
        self._weights = 0.0  # of those in ``_tenants``

    def refusal(
        self, tenant: str, rows: int, tokens: int, timeout_s: float, backlog: Backlog
    ) -> AdapterRouterError | None:
        """Why a call of so many rows may not queue; None if it may. Counts nothing.

        ``timeout_s``: how long the rows' caller waits. InvalidRequest if the queue could never hold them, Overloaded if
        it cannot now, or if what is ahead of them takes too long.
        """
        weight, share = self._weight(tenant), self._share(tenant)
        limits = self._limits(tenant, rows, tokens)
        for limit in limits:
            if limit.more > (most := limit.most_in_a_call(weight)):
                return InvalidRequest(f"{limit.more} {limit.unit} in one call, at most {most} are taken")
        excesses = [limit.excess(weight, share) for limit in limits]
        full = [limit for limit, excess in zip(limits, excesses, strict=True) if excess > 0]
        if full:
            row_tokens = self._total.tokens / max(1, self._total.rows)
            excess_tokens = max(excesses[0] * row_tokens, excesses[1])
            return _overloaded(full[0].message(tenant), excess_tokens / backlog.tokens_s if backlog.tokens_s else 0.0)
        if not backlog.tokens or backlog.tokens_s is None:
            return None
        # No replica is idle meanwhile: all that waits is a bound. The tenant has its share: its own is another.
        wait_s = min(backlog.tokens + tokens, (limits[1].own + tokens) / share) / backlog.tokens_s
        if wait_s <= _MARGIN * timeout_s:
            return None
        message = f"the wait is about {wait_s:.1f} s, too long for a timeout of {timeout_s:.3g} s"
        return _overloaded(f"{message}: {backlog.tokens} tokens are waiting", wait_s - _MARGIN * timeout_s)

    def entered(self, tenant: str, rows: int, tokens: int) -> None:
        """So many rows of ``tenant`` are queued."""
        if tenant not in self._tenants:
            self._tenants[tenant] = _Queued()
            self._weights += self._weight(tenant)
        self._tenants[tenant].add(rows, tokens)
        self._total.add(rows, tokens)

    def left(self, tenant: str, rows: int, tokens: int) -> None:
        """So many of them are not any more, answered or given up."""
        own = self._tenants[tenant]
        own.add(-rows, -tokens)
        self._total.add(-rows, -tokens)
        if not own.rows:
            del self._tenants[tenant]
            self._weights = self._weights - self._weight(tenant) if self._tenants else 0.0

    def _limits(self, tenant: str, rows: int, tokens: int) -> tuple[_Limit, _Limit]:
        total, own = self._total, self._tenants.get(tenant, _Queued())
        alone = rows == 1 and not own.rows
        return (
            _Limit("rows", self._config.max_queued_rows, total.rows, own.rows, rows, alone),
            _Limit("tokens", self._config.max_queued_tokens, total.tokens, own.tokens, tokens, alone),
        )

    def _weight(self, tenant: str) -> float:
        return self._config.tenant_weights.get(tenant, 1.0)

    def _share(self, tenant: str) -> float:
        """Of what is served, the part ``tenant`` gets while all that have rows queued still have some."""
        weight = self._weight(tenant)
        return weight / max(weight, self._weights if tenant in self._tenants else self._weights + weight)


def _overloaded(message: str, seconds: float) -> Overloaded:
    retry_s = min(max(seconds, _LOWEST_RETRY_S), _HIGHEST_RETRY_S)
    return Overloaded(f"{message}; try again in {retry_s:.0f} s", retry_after_s=retry_s)
