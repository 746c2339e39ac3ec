"""Lists that come in pages: what is asked for, and what comes around the entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from deployments.api.paths import WITHOUT_NUL

MOST = 1000

Limit = Annotated[int, Field(ge=1, le=MOST)]
_Revision = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]  # what a database can compare with


class PageQuery(BaseModel):
    """At most ``limit`` entries, after the one that ``after`` names: the last page's ``last_id``."""

    model_config = ConfigDict(extra="forbid")

    limit: Limit = 100
    after: Annotated[str, Field(pattern=WITHOUT_NUL)] | None = None


class EventsQuery(BaseModel):
    """At most ``limit`` events after revision ``after``, oldest first."""

    model_config = ConfigDict(extra="forbid")

    limit: Limit = 100
    after: _Revision = 0


def page(entries: Sequence[dict[str, Any]], limit: int, key: str) -> dict[str, Any]:
    """One page in OpenAI's shape; an entry beyond ``limit`` only says that there are more. ``key``: of entries' ids."""
    shown = list(entries[:limit])
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0][key] if shown else None,
        "last_id": shown[-1][key] if shown else None,
        "has_more": len(entries) > limit,
    }
