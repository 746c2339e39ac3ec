"""JSON objects from strangers' files: what one parser would read differently from another is refused."""

from __future__ import annotations

import json
from typing import Any


def parse_object(raw: bytes, name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The object in ``raw``, a file called ``name``, and what is wrong with it; None where it is no object at all."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            names = [key for key, _ in pairs]
            repeated.extend(key for key in document if names.count(key) > 1)
        return document

    try:
        document = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        return None, [f"{name} is not JSON: {error}"]
    if not isinstance(document, dict):
        return None, [f"{name} is not a JSON object"]
    return document, [f"{name} has the key {key!r} more than once" for key in repeated[:8]]
