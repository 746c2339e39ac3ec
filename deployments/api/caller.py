"""Who asks, and for how long: headers of every inference route, and how a request's rows reach the router."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Header
from pydantic import AfterValidator

from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult
from deployments.router import Router, current_router

_MOST_MS = 24 * 60 * 60 * 1000
_LONGEST_TENANT = 128


@dataclass(frozen=True)
class Caller:
    """The caller of one request. ``until``: of ``time.monotonic``, when it stops waiting; None: it does not say."""

    router: Router
    tenant: str = ""
    until: float | None = None

    async def outcomes(self, rows: Sequence[Row], priority: int, *, together: bool = False) -> list[RowOutcome]:
        """Outcomes of ``rows`` in the caller's name; ``together``: see ``Router.infer_many``."""
        left = self._left_s
        asked = [replace(row, tenant=self.tenant, priority=priority, timeout_s=left) for row in rows]
        return await self.router.infer_many(asked, together=together)

    async def answer(self, rows: Sequence[Row], priority: int) -> list[RowResult]:
        """Results of ``rows``. Raises the error of the first that failed."""
        return results_of(await self.outcomes(rows, priority))

    async def version_of(self, row: Row) -> AdapterVersion | AdapterRouterError | None:
        """As ``Router.version_of``, in what is left of the caller's time."""
        return await self.router.version_of(replace(row, timeout_s=self._left_s))

    @property
    def _left_s(self) -> float | None:
        return None if self.until is None else self.until - time.monotonic()


def results_of(outcomes: Sequence[RowOutcome]) -> list[RowResult]:
    """Raises the first error among ``outcomes``."""
    results = []
    for outcome in outcomes:
        if isinstance(outcome, AdapterRouterError):
            raise outcome
        results.append(outcome)
    return results


def _printable(tenant: str) -> str:
    if not tenant.isprintable():
        raise ValueError("must be printable characters")
    return tenant


def _current_caller(
    router: Annotated[Router, Depends(current_router)],
    timeout_ms: Annotated[
        int | None,
        Header(
            alias="x-request-timeout-ms",
            gt=0,
            le=_MOST_MS,
            description="Milliseconds after which nobody waits for the answer: 504 from then on, and no work is done.",
        ),
    ] = None,
    serve_timeout: Annotated[
        str | None,
        Header(
            alias="x-request-timeout-seconds",
            description="Ray Serve's own: seconds, where x-request-timeout-ms is absent. The proxy answers 408 then.",
        ),
    ] = None,
    tenant: Annotated[
        str,
        AfterValidator(_printable),
        Header(
            alias="x-tenant",
            max_length=_LONGEST_TENANT,
            description="Whose share of the service the rows take; those of one tenant wait for each other.",
        ),
    ] = "",
) -> Caller:
    """The caller that the request's headers tell of."""
    seconds = _seconds(serve_timeout) if timeout_ms is None else timeout_ms / 1000
    return Caller(router, tenant, None if seconds is None else time.monotonic() + seconds)


CurrentCaller = Annotated[Caller, Depends(_current_caller)]
"""A route's parameter."""


def _seconds(value: str | None) -> float | None:
    """As Serve reads its header: what is no number is no limit, and 0 or less says that there shall be none."""
    try:
        seconds = float(value or 0)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
