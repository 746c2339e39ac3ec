"""Encoded rows of one call: a text that several adapters are asked about is tokenised once, a picture read once."""

from __future__ import annotations

from collections.abc import Hashable

from adapter_router.engine.inputs import EncodedRow, RowEncoder
from adapter_router.errors import InvalidRequest
from adapter_router.types import Row


class Encodings:
    """Encodes the rows of one call. Not thread-safe."""

    def __init__(self, encoder: RowEncoder) -> None:
        self._encoder = encoder
        self._known: dict[Hashable, EncodedRow | InvalidRequest] = {}

    def encode(self, row: Row, prefix: str) -> EncodedRow:
        """As ``RowEncoder.encode``, which depends on nothing else of a row than is compared here."""
        key = _key(row, prefix)
        if key is None:
            return self._encoder.encode(row, prefix)
        known = self._known.get(key)
        if known is None:
            try:
                known = self._encoder.encode(row, prefix)
            except InvalidRequest as error:
                known = error
            self._known[key] = known
        if isinstance(known, InvalidRequest):
            raise type(known)(known.message, known.param, known.problems)
        return known


def _key(row: Row, prefix: str) -> Hashable | None:
    """Equal for rows that are encoded alike; None for features, which cost nothing, and for what may be malformed."""
    limit = row.parameters.get("truncate_prompt_tokens")
    if not (limit is None or type(limit) is int):
        return None
    inputs = row.inputs
    if isinstance(inputs, tuple) and not all(isinstance(text, str) for text in inputs):
        return None
    return (inputs, prefix, limit) if isinstance(inputs, str | bytes | tuple) else None
