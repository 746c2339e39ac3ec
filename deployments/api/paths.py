"""Names in paths. They may contain slashes (``org/name``), so what stands behind a name must be told from it.

What may follow a name is a fixed list of words, and the catalog lets no name end in ``/`` and one of them: so a path
never means two things. The words win; ``%2F`` is a slash like any other.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from starlette.exceptions import HTTPException

from adapter_router.catalog.addressing import action_of

WITHOUT_NUL = r"^[^\x00]*$"  # which PostgreSQL takes in no text
Name = Annotated[str, Path(min_length=1, pattern=WITHOUT_NUL)]
Number = Annotated[int, Path(le=999_999_999)]
"""Of a version; what an address can say (``name@v999999999``)."""


def refuse_action(name: str) -> None:
    """Answer 405 where the path's end is an action that this method does not know: never act on another adapter."""
    if action := action_of(name):
        raise HTTPException(405, f"{action} does not take this method")
